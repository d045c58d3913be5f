// Line charts over steps: hover and keyboard values, zoom and pan shared by all, log scale, smoothing, PNG and CSV.
// All text enters the page as textContent.
"use strict";

const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3], [5, 2], [1, 2], [12, 4, 2, 4, 2, 4], [6, 6]];
const all = new Set();          // charts on the page
const view = { min: null, max: null, smoothing: 0 };

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const seriesColor = (i) => color(`--s${i % 8}`);
const seriesDash = (i) => DASHES[i % DASHES.length];

// Control, direction and other characters without a look of their own, written out.
const HIDDEN = /[\p{Cc}\p{Cf}\p{Co}\p{Cs}\p{Cn}\p{Zl}\p{Zp}]/gu;
function visible(text) {
  const shown = String(text).replace(HIDDEN, (c) => "\\u" + c.codePointAt(0).toString(16).padStart(4, "0"));
  return shown.trim() === shown ? shown : shown.replace(/ /g, "␣");
}

function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return String(value);
  if (size >= 1e12) return (value / 1e12).toFixed(3) + " T";
  if (size >= 1e9) return (value / 1e9).toFixed(3) + " B";
  if (size >= 1e6) return (value / 1e6).toFixed(3) + " M";
  if (size > 0 && size < 1e-3) return value.toExponential(3).replace(/\.?0+e/, "e");
  return String(+value.toPrecision(5));
}
const percent = (value) => (100 * value).toFixed(1) + " %";
const bytes = (value) => (value / 1e9).toFixed(2) + " GB";

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function save(name, blob) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name.replace(/[^\w.-]+/g, "-") });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
const quoted = (cell) => (/[",\n\r]/.test(String(cell)) ? `"${String(cell).replace(/"/g, '""')}"` : String(cell));
function saveCsv(name, header, rows) {
  const text = [header, ...rows].map((row) => row.map(quoted).join(",")).join("\n") + "\n";
  save(`${name}.csv`, new Blob([text], { type: "text/csv" }));
}

// A canvas with its title and what its lines are, on the page's background.
function savePng(title, source, names) {
  const ratio = source.width / (source.clientWidth || source.width);
  const line = 20 * ratio, canvas = make("canvas"), pen = canvas.getContext("2d");
  canvas.width = source.width;
  canvas.height = source.height + line * (names.length + 2);
  pen.fillStyle = color("--card");
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.fillStyle = color("--ink");
  pen.font = `600 ${14 * ratio}px system-ui, sans-serif`;
  pen.fillText(title, 8 * ratio, line);
  pen.drawImage(source, 0, line * 1.5);
  pen.font = `${12 * ratio}px system-ui, sans-serif`;
  names.forEach(([name, style], i) => {
    const y = source.height + line * (i + 2.2);
    if (style) {
      pen.strokeStyle = style.stroke; pen.lineWidth = 3 * ratio; pen.setLineDash(style.dash.map((d) => d * ratio));
      pen.beginPath(); pen.moveTo(8 * ratio, y - 4 * ratio); pen.lineTo(36 * ratio, y - 4 * ratio); pen.stroke();
    }
    pen.fillStyle = color("--ink");
    pen.fillText(name, 44 * ratio, y);
  });
  canvas.toBlob((blob) => save(`${title}.png`, blob));
}

function swatch(i) {
  const canvas = make("canvas", { class: "swatch", width: 52, height: 16, "aria-hidden": "true" });
  const pen = canvas.getContext("2d");
  pen.strokeStyle = seriesColor(i); pen.lineWidth = 5; pen.setLineDash(seriesDash(i).map((d) => d * 1.4));
  pen.beginPath(); pen.moveTo(0, 8); pen.lineTo(52, 8); pen.stroke();
  return canvas;
}

// The values under a chart. They are read aloud while its keys are used, and not whenever newer numbers arrive.
const valuesOf = (spec) => make("output", { class: "values", "aria-live": "off", "aria-label": `Values: ${spec.title}` });
const spokenBy = (values) => ({ onfocus: () => values.setAttribute("aria-live", "polite"), onblur: () => values.setAttribute("aria-live", "off") });

// Put other children into an element unless they look the same: what is focused or selected there stays so.
function replace(host, ...children) {
  const looks = children.map((child) => child.outerHTML).join("") + color("--s0");
  if (host.looks === looks) return;
  host.looks = looks;
  host.replaceChildren(...children);
}

// Exponential moving average, without the pull of the first value (as TensorBoard's).
function smooth(y, weight) {
  let last = 0, norm = 0;
  return y.map((value) => {
    last = last * weight + (1 - weight) * value;
    norm = norm * weight + (1 - weight);
    return last / norm;
  });
}

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

// A chart.  spec: id, title, note, format, zero (begins at 0), phases [{name, from, to}],
// lines: [{name, index, x, y, mean, marks {x, y}}]
class Chart {
  constructor(host, spec) {
    this.log = false;
    this.button = make("button", { type: "button", "aria-pressed": "false", text: "log", "aria-label": `Logarithmic scale: ${spec.title}`,
      onclick: () => { this.log = !this.log; this.button.setAttribute("aria-pressed", this.log); this.draw(); } });
    this.values = valuesOf(spec);
    this.read = null;  // the step that a cursor is at
    this.plot = make("div", { class: "plot", tabindex: "0", role: "group", "aria-roledescription": "chart", onkeydown: (event) => this.key(event), ...spokenBy(this.values) });
    this.note = make("p", { class: "note" });
    host.append(make("figure", { class: "card chart", id: spec.id },
      make("figcaption", {}, make("h3", { text: spec.title }), this.button,
        make("button", { type: "button", text: "PNG", "aria-label": `PNG of ${spec.title}`, onclick: () => this.png() }),
        make("button", { type: "button", text: "CSV", "aria-label": `CSV of ${spec.title}`, onclick: () => this.csv() })),
      this.note, this.plot, this.values));
    all.add(this);
    this.update(spec);
  }

  update(spec) { this.spec = spec; this.note.textContent = spec.note || ""; this.note.hidden = !spec.note; this.draw(); }
  first() { return Math.min(...this.spec.lines.map((line) => line.x[0])); }
  last() { return Math.max(...this.spec.lines.map((line) => line.x[line.x.length - 1])); }

  draw() {
    const { spec, read } = this, tables = [], series = [{}];
    const positive = (y) => (this.log ? y.map((v) => (v > 0 ? v : null)) : y);
    for (const line of spec.lines) {
      const stroke = seriesColor(line.index), dash = seriesDash(line.index), faint = view.smoothing > 0;
      tables.push([line.x, positive(line.y)]);
      series.push({ stroke: stroke, dash, alpha: faint ? 0.25 : 1, width: faint ? 1 : 1.75, spanGaps: true, points: { show: line.x.length < 40, size: 5, fill: stroke } });
      if (faint) {
        const { x, y } = line.mean || line;
        tables.push([x, positive(smooth(y, view.smoothing))]);
        series.push({ stroke, dash, width: 2, spanGaps: true, points: { show: false } });
      }
      if (line.marks && line.marks.x.length) {
        tables.push([line.marks.x, positive(line.marks.y)]);
        series.push({ paths: () => null, points: { show: true, size: 9, stroke: color("--bad"), fill: color("--card"), width: 2 } });
      }
    }
    const axis = { stroke: color("--soft"), grid: { stroke: color("--line"), width: 1 }, ticks: { stroke: color("--line") }, font: "11px system-ui, sans-serif" };
    const options = {
      width: Math.max(200, this.plot.clientWidth), height: 220,
      series, legend: { show: false },
      scales: { x: { time: false, range: (u, low, high) => (view.min === null ? [low, high === low ? low + 1 : high] : [view.min, view.max]) },
        y: { distr: this.log ? 3 : 1, range: this.log ? undefined : (u, low, high) => this.range(low, high) } },
      axes: [{ ...axis, size: 32, values: (u, ticks) => ticks.map(number) }, { ...axis, size: 62, values: (u, ticks) => ticks.map((v) => (v === null ? "" : spec.format(v))) }],
      cursor: { sync: { key: "steps", setSeries: false }, drag: { x: true, y: false, setScale: false }, points: { size: 7 } },
      hooks: {
        drawClear: [(u) => this.shade(u)],
        setCursor: [(u) => { this.read = u.cursor.idx === null || u.cursor.idx === undefined ? null : u.data[0][u.cursor.idx]; this.tell(); }],
        setSelect: [(u) => {
          if (u.select.width < 4) return;
          showRange(u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x"));
          u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
        }],
      },
    };
    if (this.chart) this.chart.destroy();
    this.chart = new uPlot(options, uPlot.join(tables), this.plot);
    this.chart.over.addEventListener("dblclick", () => showRange(null, null));
    this.chart.over.addEventListener("mousedown", (event) => this.pan(event), true);
    queueMicrotask(() => this.goTo(read));  // once it is drawn, which takes the cursor away
    this.tell();
  }

  goTo(step) { if (step !== null) this.chart.setCursor({ left: this.chart.valToPos(step, "x"), top: 20 }); }

  range(low, high) {
    if (low === null || low === undefined) return [0, 1];
    if (this.spec.zero) low = Math.min(0, low);
    const room = high > low ? (high - low) * 0.06 : Math.abs(high) * 0.05 || 1;
    return [this.spec.zero && low === 0 ? 0 : low - room, high + room];
  }

  shade(u) {
    const pen = u.ctx, { left, top, width, height } = u.bbox;
    (this.spec.phases || []).forEach((phase, i) => {
      const x0 = Math.max(left, u.valToPos(phase.from, "x", true)), x1 = Math.min(left + width, u.valToPos(phase.to, "x", true));
      if (x1 <= x0) return;
      pen.save();
      pen.fillStyle = color("--shade");
      if (i % 2 === 0) pen.fillRect(x0, top, x1 - x0, height);
      pen.fillStyle = color("--soft");
      pen.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
      if (x1 - x0 > pen.measureText(phase.name).width + 8) pen.fillText(phase.name, x0 + 5 * devicePixelRatio, top + height - 6 * devicePixelRatio);
      pen.restore();
    });
  }

  // The values at the step of the cursor; the last of each line where there is none.
  tell() {
    const step = this.read;
    const parts = step === null ? [] : [make("span", {}, "step ", make("b", { text: number(step) }))];
    for (const line of this.spec.lines) {
      const i = step === null ? line.x.length - 1 : nearest(line.x, step);
      const smoothed = view.smoothing > 0 ? ` (smoothed ${this.spec.format(smooth((line.mean || line).y, view.smoothing)[nearest((line.mean || line).x, line.x[i])])})` : "";
      parts.push(make("span", {}, swatch(line.index), `${visible(line.name)} `, make("b", { text: this.spec.format(line.y[i]) }), smoothed, step !== null && line.x[i] === step ? "" : ` at ${number(line.x[i])}`));
    }
    replace(this.values, ...parts);
    this.plot.setAttribute("aria-label", `${this.spec.title}: ${parts.map((part) => part.textContent).join("; ")}`);
  }

  zoom() { this.chart.setData(this.chart.data); }

  key(event) {
    const u = this.chart, steps = u.data[0], [low, high] = [u.scales.x.min, u.scales.x.max];
    const inside = (i) => steps[i] >= low && steps[i] <= high;
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (way && !event.shiftKey) {
      let i = u.cursor.idx === null || u.cursor.idx === undefined ? (way > 0 ? -1 : steps.length) : u.cursor.idx;
      do i += way; while (i >= 0 && i < steps.length && !inside(i));
      if (i >= 0 && i < steps.length) this.goTo(steps[i]);
    } else if (!zoomed(event)) return;
    event.preventDefault();
  }

  pan(event) {
    if (!event.shiftKey) return;
    event.stopImmediatePropagation();
    const u = this.chart, from = event.clientX, { min, max } = u.scales.x, width = u.over.clientWidth;
    const [low, high] = [Math.min(...[...all].map((c) => c.first())), Math.max(...[...all].map((c) => c.last()))];
    const move = (to) => {
      const by = Math.max(low - min, Math.min(high - max, ((from - to.clientX) / width) * (max - min)));
      showRange(min + by, max + by);
    };
    const stop = () => { removeEventListener("mousemove", move); removeEventListener("mouseup", stop); };
    addEventListener("mousemove", move);
    addEventListener("mouseup", stop);
  }

  png() { savePng(this.spec.title, this.chart.ctx.canvas, this.spec.lines.map((line) => [visible(line.name), { stroke: seriesColor(line.index), dash: seriesDash(line.index) }])); }
  csv() { saveCsv(this.spec.title, ["run", "step", "value"], this.spec.lines.flatMap((line) => line.x.map((x, i) => [line.name, x, line.y[i]]))); }
}

// The place in an ascending list of the value next to `x`.
function nearest(list, x) {
  let low = 0, high = list.length - 1;
  while (high - low > 1) { const mid = (low + high) >> 1; if (list[mid] <= x) low = mid; else high = mid; }
  return Math.abs(list[high] - x) < Math.abs(list[low] - x) ? high : low;
}
