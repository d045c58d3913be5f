// Line charts over steps: values by hover and keyboard, lines that switch on and off, log scale, smoothing.
"use strict";

// Exponential moving average, without the pull of the first value (as TensorBoard's).
function smooth(y, weight) {
  let last = 0, norm = 0;
  return y.map((value) => {
    last = last * weight + (1 - weight) * value;
    norm = norm * weight + (1 - weight);
    return last / norm;
  });
}

// Distances of the marks on the axis of steps: a step is whole.
const WHOLE = Array.from({ length: 15 }, (_, power) => [1, 2, 5].map((digit) => digit * 10 ** power)).flat();

// A chart.  spec: as of a Figure, and format, zero (begins at 0), phases ("shaded"; "told": with bands and in values)
// lines: [{name, index, x, y, mean, stderr, marks {x, y}, phases [{name, from, to}]}]
class Chart extends Figure {
  constructor(host, spec) {
    super(host, spec, "chart", make("div", { class: "plot", tabindex: "0", role: "group", "aria-roledescription": "chart", onkeydown: (event) => this.press(event) }));
    this.read = null;  // the step that a cursor is at
    this.step = make("span");
    all.add(this);
    this.update(spec);
  }

  lineKey(line) { return `${this.spec.key}\n${line.name}`; }
  get lines() { return this.spec.lines.filter((line) => !off.has(this.lineKey(line))); }
  first() { return Math.min(...this.lines.map((line) => line.x[0])); }
  last() { return Math.max(...this.lines.map((line) => line.x[line.x.length - 1])); }

  draw() {
    const { spec, read, lines } = this, tables = [], series = [{}], log = this.isLog;
    const positive = (y) => (log ? y.map((v) => (v > 0 ? v : null)) : y);
    for (const line of lines) {
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
    this.shading = spec.phases ? shading(lines, spec.phases === "told") : { whole: [], bands: [], names: [], room: 0 };
    replace(this.key, ...phaseKey(this.shading.names));
    const { room } = this.shading;
    const axis = { stroke: color("--soft"), grid: { stroke: color("--line"), width: 1 }, ticks: { stroke: color("--line") }, font: "11px system-ui, sans-serif" };
    const options = {
      width: Math.max(200, this.plot.clientWidth), height: 220 + room,
      series, legend: { show: false }, padding: [room ? room + 4 : null, null, null, null],
      scales: { x: { time: false, range: (u, low, high) => this.steps(low, high) },
        y: { distr: log ? 3 : 1, range: log ? undefined : (u, low, high) => this.range(low, high) } },
      axes: [{ ...axis, size: 32, incrs: WHOLE, values: (u, ticks) => ticks.map(number) }, { ...axis, size: 62, values: (u, ticks) => ticks.map((v) => (v === null ? "" : spec.format(v))) }],
      cursor: { sync: { key: "steps", setSeries: false }, drag: { x: true, y: false, setScale: false }, points: { size: 7 } },
      hooks: {
        drawClear: [(u) => shade(u, this.shading)],
        setCursor: [(u) => { this.read = u.cursor.idx === null || u.cursor.idx === undefined ? null : u.data[0][u.cursor.idx]; this.tell(); }],
        setSelect: [(u) => {
          if (u.select.width < 4) return;
          showRange(u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x"));
          u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
        }],
      },
    };
    if (this.chart) this.chart.destroy();
    this.chart = new uPlot(options, tables.length ? uPlot.join(tables) : [[]], this.plot);
    this.chart.over.addEventListener("dblclick", () => showRange(null, null));
    this.chart.over.addEventListener("mousedown", (event) => this.pan(event), true);
    queueMicrotask(() => this.goTo(read));  // once it is drawn, which takes the cursor away
  }

  goTo(step) { if (step !== null) this.chart.setCursor({ left: this.chart.valToPos(step, "x"), top: 20 }); }

  steps(low, high) {
    if (view.min !== null) return [view.min, view.max];
    return low === null || low === undefined ? [0, 1] : [low, high === low ? low + 1 : high];
  }

  range(low, high) {
    if (low === null || low === undefined) return [0, 1];
    if (this.spec.zero) low = Math.min(0, low);
    const room = high > low ? (high - low) * 0.06 : Math.abs(high) * 0.05 || 1;
    return [this.spec.zero && low === 0 ? 0 : low - room, high + room];
  }

  // A button for each line. They stay the same elements while the lines do, so that a focus stays where it is.
  legend() {
    const looks = this.spec.lines.map((line) => `${line.index} ${line.name}`).join("\n") + color("--s0");
    if (looks === this.looks) return;
    this.looks = looks;
    this.buttons = this.spec.lines.map((line) => make("button", { type: "button", class: "line", title: "Switch this line off or on",
      onclick: () => { flip(off, this.lineKey(line)); this.draw(); this.tell(); } }, swatch(line.index), `${visible(line.name)} `, make("b"), make("span")));
    this.values.replaceChildren(this.step, ...this.buttons);
  }

  // The values at the step of the cursor; the last of each line where there is none.
  tell() {
    const step = this.read, put = (element, text) => { if (element.textContent !== text) element.textContent = text; };
    this.legend();
    put(this.step, step === null ? "" : `step ${number(step)}`);
    this.spec.lines.forEach((line, i) => {
      const [, value, more] = this.buttons[i].children, on = !off.has(this.lineKey(line));
      this.buttons[i].setAttribute("aria-pressed", on);
      put(value, on ? this.valueOf(line, step) : "");
      put(more, on ? this.moreOf(line, step) : "off");
    });
    const read = [this.step, ...this.buttons].map((one) => one.textContent).filter(Boolean);
    this.plot.setAttribute("aria-label", `${this.spec.title}: ${read.join("; ")}`);
  }

  valueOf(line, step) { return this.spec.format(line.y[placeOf(line, step)]); }
  moreOf(line, step) {
    const { format, phases } = this.spec, i = placeOf(line, step), parts = [];
    if (line.stderr && line.stderr[i] !== null) parts.push(`± ${format(line.stderr[i])}`);
    if (view.smoothing > 0) {
      const { x, y } = line.mean || line;
      parts.push(`(smoothed ${format(smooth(y, view.smoothing)[nearest(x, line.x[i])])})`);
    }
    if (phases === "told" && phaseAt(line.phases, line.x[i])) parts.push(`(${phaseAt(line.phases, line.x[i])})`);
    if (step === null || line.x[i] !== step) parts.push(`at ${number(line.x[i])}`);
    return parts.map((part) => ` ${part}`).join("");
  }

  zoom() { this.chart.setData(this.chart.data); }

  press(event) {
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

  savePng() {
    const drawn = this.lines.map((line) => [visible(line.name), { stroke: seriesColor(line.index), dash: seriesDash(line.index) }]);
    savePng(this.spec.title, this.chart.ctx.canvas, [...drawn, ...this.shading.names.map((name) => [name, { fill: phaseColor(name) }])]);
  }

  saveCsv() {
    const told = this.spec.phases === "told";
    const rows = this.lines.flatMap((line) => line.x.map((x, i) => [line.name, x, line.y[i], ...(told ? [phaseAt(line.phases, x)] : [])]));
    saveCsv(this.spec.title, ["run", "step", "value", ...(told ? ["phase"] : [])], rows);
  }
}

// The place in a line of the value at a step; of the last one where there is no step.
const placeOf = (line, step) => (step === null ? line.x.length - 1 : nearest(line.x, step));

// The place in an ascending list of the value next to `x`.
function nearest(list, x) {
  let low = 0, high = list.length - 1;
  while (high - low > 1) { const mid = (low + high) >> 1; if (list[mid] <= x) low = mid; else high = mid; }
  return Math.abs(list[high] - x) < Math.abs(list[low] - x) ? high : low;
}
