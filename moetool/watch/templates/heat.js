// Heatmaps over steps: rows are layers or experts. The colours are viridis, which grows lighter evenly, so that
// colour-blind people and prints in grey show the same order.
"use strict";

const VIRIDIS = [[68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129], [92, 200, 99], [170, 220, 50], [253, 231, 37]];
function viridis(share) {
  const place = Math.max(0, Math.min(1, share)) * (VIRIDIS.length - 1), i = Math.min(VIRIDIS.length - 2, Math.floor(place)), part = place - i;
  return `rgb(${VIRIDIS[i].map((c, k) => Math.round(c + part * (VIRIDIS[i + 1][k] - c))).join(",")})`;
}

// spec: as of a Figure, and rows [name], rowName, x [step], values [row][column], format, smallest (is the worst value),
// pick (row) or null, picked (row) or null, scales {linear, log}, each {low, high, lowName, highName}: ends of the colours
class Heat extends Figure {
  constructor(host, spec, ...controls) {
    const canvas = make("canvas", { tabindex: "0", role: "group", "aria-roledescription": "heatmap",
      onmousemove: (event) => this.point(event), onmouseleave: () => { this.at = null; this.zoom(); },
      onclick: (event) => { this.point(event); this.choose(); }, onkeydown: (event) => this.press(event) });
    super(host, spec, "wide heat", make("div", { class: "plot" }, canvas), ...controls);
    this.canvas = canvas;
    this.at = null;  // the row and the column that are pointed at
    this.bar = make("canvas", { width: 150, height: 14, "aria-hidden": "true" });
    this.update(spec);
  }

  draw() {
    const { rows, x, format } = this.spec, { low, high, lowName, highName } = this.ends, log = this.isLog;
    if (this.at) this.at = [Math.min(this.at[0], rows.length - 1), Math.min(this.at[1], x.length - 1)];
    const middle = log ? Math.sqrt(low * high) : (low + high) / 2;
    this.key.replaceChildren(lowName, this.bar, highName, make("span", { text: `${log ? "logarithmic, " : ""}middle ${format(middle)}` }));
    this.paint();
  }

  get ends() { return this.spec.scales[this.isLog ? "log" : "linear"]; }

  // Where a value lies between the ends of the colours.
  share(value) {
    const { low, high } = this.ends, place = this.isLog ? (v) => Math.log(Math.max(v, low)) : (v) => v;
    return (place(value) - place(low)) / (place(high) - place(low) || 1);
  }

  zoom() { this.paint(); this.tell(); }

  // Where the cells lie, in CSS pixels.
  box() {
    const rows = this.spec.rows.length, cell = Math.max(5, Math.min(22, 420 / rows));
    return { left: 46, top: 4, width: Math.max(60, this.plot.clientWidth - 56), height: cell * rows, cell };
  }

  // The columns, from and to, of the steps that all charts show; each stands for the steps since the one before it.
  columns() {
    const x = this.spec.x, reaches = (step) => { const c = x.findIndex((one) => one >= step); return c < 0 ? x.length - 1 : c; };
    return view.min === null ? [0, x.length] : [reaches(view.min), reaches(view.max) + 1];
  }

  paint() {
    const { spec, canvas } = this, box = this.box(), ratio = devicePixelRatio || 1, pen = canvas.getContext("2d");
    canvas.width = (box.left + box.width + 10) * ratio;
    canvas.height = (box.top + box.height + 22) * ratio;
    canvas.style.width = canvas.width / ratio + "px";
    canvas.style.height = canvas.height / ratio + "px";
    pen.scale(ratio, ratio);
    pen.font = "11px system-ui, sans-serif";
    const [from, to] = this.columns(), columns = to - from, wide = box.width / columns, every = Math.ceil(13 / box.cell);
    spec.rows.forEach((name, r) => {
      const y = box.top + r * box.cell;
      for (let c = from; c < to; c++) {
        pen.fillStyle = Number.isFinite(spec.values[r][c]) ? viridis(this.share(spec.values[r][c])) : color("--mid");
        pen.fillRect(box.left + (c - from) * wide, y, wide + 0.6, box.cell - (box.cell > 8 ? 1 : 0));
      }
      pen.fillStyle = color(r === spec.picked ? "--ink" : "--soft");
      pen.textAlign = "right";
      if (r % every === 0 || r === spec.picked) pen.fillText(visible(name).slice(0, 7), box.left - 5, y + box.cell / 2 + 4);
    });
    pen.strokeStyle = color("--ink");
    pen.lineWidth = 2;
    if (spec.picked !== null && spec.picked !== undefined) pen.strokeRect(box.left, box.top + spec.picked * box.cell, box.width, box.cell - 1);
    if (this.at && this.at[1] >= from && this.at[1] < to) pen.strokeRect(box.left + (this.at[1] - from) * wide - 1, box.top + this.at[0] * box.cell - 1, wide + 2, box.cell + 1);
    pen.fillStyle = color("--soft");
    pen.textAlign = "center";
    const ticks = Math.min(columns, Math.max(2, Math.floor(box.width / 90)));
    for (let i = 0; i < ticks; i++) {
      const c = ticks === 1 ? 0 : Math.round((i * (columns - 1)) / (ticks - 1));
      pen.fillText(number(spec.x[from + c]), Math.min(box.left + (c + 0.5) * wide, box.left + box.width - 12), box.top + box.height + 15);
    }
  }

  // The value of the cell that is pointed at; the worst of the last column where there is none.
  tell() {
    const { spec } = this, last = this.columns()[1] - 1;
    let [r, c] = this.at || [0, last], prefix = "";
    if (!this.at) {
      const sign = spec.smallest ? -1 : 1;
      for (let i = 0; i < spec.rows.length; i++) if (sign * spec.values[i][last] > sign * spec.values[r][last]) r = i;
      prefix = spec.smallest ? "smallest: " : "largest: ";
    }
    const text = `${prefix}${spec.rowName} ${visible(spec.rows[r])}, step ${number(spec.x[c])}: `;
    replace(this.values, make("span", {}, text, make("b", { text: spec.format(spec.values[r][c]) })));
    this.canvas.setAttribute("aria-label", `${spec.title}: ${this.values.textContent}`);
    this.paintKey(spec.values[r][c]);
  }

  // The colours, with a mark where the value lies that is told.
  paintKey(value) {
    const pen = this.bar.getContext("2d"), { width, height } = this.bar;
    for (let i = 0; i < width; i++) { pen.fillStyle = viridis(i / (width - 1)); pen.fillRect(i, 0, 1, height); }
    const x = Math.max(2, Math.min(width - 2, this.share(value) * width));
    pen.fillStyle = color("--card"); pen.fillRect(x - 2, 0, 4, height);
    pen.fillStyle = color("--ink"); pen.fillRect(x - 1, 0, 2, height);
  }

  point(event) {
    const box = this.box(), place = this.canvas.getBoundingClientRect();
    const [from, to] = this.columns(), r = Math.floor((event.clientY - place.top - box.top) / box.cell);
    const c = from + Math.floor(((event.clientX - place.left - box.left) / box.width) * (to - from));
    this.at = r >= 0 && r < this.spec.rows.length && c >= from && c < to ? [r, c] : null;
    this.zoom();
  }

  choose() { if (this.at && this.spec.pick) this.spec.pick(this.at[0]); }

  press(event) {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (event.key === "Enter" || event.key === " ") this.choose();
    else if (moves[event.key] && !event.shiftKey) {
      const [from, to] = this.columns(), [r, c] = this.at || [0, to - 1], [dr, dc] = this.at ? moves[event.key] : [0, 0];
      this.at = [Math.max(0, Math.min(this.spec.rows.length - 1, r + dr)), Math.max(from, Math.min(to - 1, c + dc))];
      this.zoom();
    } else if (!zoomed(event)) return;
    event.preventDefault();
  }

  savePng() { savePng(this.spec.title, this.canvas, [[this.values.textContent, null]]); }

  saveCsv() {
    const { spec } = this;
    saveCsv(spec.title, [spec.rowName, ...spec.x.map((x) => `step ${x}`)], spec.rows.map((name, r) => [name, ...spec.values[r]]));
  }
}
