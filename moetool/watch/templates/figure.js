// What charts and heatmaps share: a card with title, buttons, key and values, and the steps that all of them show.
"use strict";

const all = new Set();          // charts on the page
const view = { min: null, max: null, smoothing: 0 };
// What the user has switched: keys of figures on a log scale, and of lines that are off. Keys outlive the elements.
const logs = new Set(), off = new Set();
const flip = (set, key) => { if (!set.delete(key)) set.add(key); };

function showRange(min, max) {
  if (view.min === min && view.max === max) return;
  [view.min, view.max] = [min, max];
  for (const chart of all) chart.zoom();
  for (const heat of document.querySelectorAll(".heat")) heat.dispatchEvent(new Event("zoom"));
}

function shift(share, factor) {
  let low = Infinity, high = -Infinity;
  for (const chart of all) [low, high] = [Math.min(low, chart.first()), Math.max(high, chart.last())];
  let [min, max] = view.min === null ? [low, high] : [view.min, view.max];
  const middle = (min + max) / 2 + share * (max - min), half = ((max - min) / 2) * factor;
  [min, max] = [Math.max(low, middle - half), Math.min(high, middle + half)];
  if (max > min) showRange(...(min <= low && max >= high ? [null, null] : [min, max]));
}

// Whether a key zoomed or panned.
function zoomed(event) {
  const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (event.key === "+" || event.key === "=") shift(0, 0.5);
  else if (event.key === "-") shift(0, 2);
  else if (event.key === "0") showRange(null, null);
  else if (way && event.shiftKey) shift(way * 0.25, 1);
  else return false;
  return true;
}

// spec: id, key (what it is called in `logs`), title, note
class Figure {
  constructor(host, spec, kind, plot, ...controls) {
    this.spec = spec;
    this.plot = plot;
    this.heading = make("h3");
    this.note = make("p", { class: "note" });
    this.key = make("div", { class: "key" });
    // Values are read aloud while the plot's keys are used, and not whenever newer numbers arrive.
    this.values = make("output", { class: "values", "aria-live": "off" });
    plot.addEventListener("focusin", () => this.values.setAttribute("aria-live", "polite"));
    plot.addEventListener("focusout", () => this.values.setAttribute("aria-live", "off"));
    const button = (text, onclick) => make("button", { type: "button", text, onclick });
    this.log = button("log", () => { flip(logs, this.spec.key); this.update(this.spec); });
    this.png = button("PNG", () => this.savePng());
    this.csv = button("CSV", () => this.saveCsv());
    host.append(make("figure", { class: `card ${kind}`, id: spec.id, onzoom: () => this.zoom() },
      make("figcaption", {}, this.heading, ...controls, this.log, this.png, this.csv), this.note, plot, this.key, this.values));
  }

  get isLog() { return logs.has(this.spec.key); }

  update(spec) {
    this.spec = spec;
    this.heading.textContent = spec.title;
    this.note.textContent = spec.note || "";
    this.note.hidden = !spec.note;
    this.log.setAttribute("aria-pressed", this.isLog);
    for (const [element, name] of [[this.log, "Logarithmic scale: "], [this.png, "PNG of "], [this.csv, "CSV of "], [this.values, "Values: "]])
      element.setAttribute("aria-label", name + spec.title);
    this.draw();
    this.tell();
  }
}
