// The page: what is shown of each run, in which order; and how it stays up to date.
"use strict";

let documents = JSON.parse(document.getElementById("data").textContent);
const hidden = new Set();       // names of runs that are not shown
const drawn = new Map();        // id -> Chart or Heat
const picked = { run: null, layer: null, measure: "mri", change: false };  // layer: its name; null: the worst one
const byId = (id) => document.getElementById(id);
const shown = () => documents.runs.filter((run) => !hidden.has(run.name));
const indexOf = (run) => documents.runs.findIndex((other) => other.name === run.name);

const STATES = { running: "running", quiet: "no new row for a while", stopped: "stopped", finished: "finished", starting: "starting", gone: "deleted", unknown: "its folder could not be read" };

function ago(seconds) {
  if (seconds === null || seconds === undefined) return "";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${Math.round(seconds / 3600)} h`;
}

// Text in which an option is not broken at its hyphens.
const spelled = (text) => visible(text).split(/(--[a-z][a-z-]*)/).map((part, i) => (i % 2 ? make("span", { class: "option", text: part }) : part));

// ---- runs and their verdicts

function drawRuns() {
  replace(byId("runs"), ...documents.runs.map((run) => make("button", { type: "button", "aria-pressed": String(!hidden.has(run.name)), "aria-label": `Show ${visible(run.name)}`,
    onclick: (event) => { hidden.has(run.name) ? hidden.delete(run.name) : hidden.add(run.name); drawAll(); byId("runs").children[indexOf(run)].focus(); event.preventDefault(); } },
    swatch(indexOf(run)), visible(run.name))));
  byId("runs").hidden = documents.runs.length < 2;
}

function drawProblems() {
  replace(byId("problems"), ...documents.problems.map((text) => make("p", { class: "card problem", text: visible(text) })));
}

function drawVerdict() {
  replace(byId("verdict"), ...shown().map((run) => {
    const s = run.status, share = s.steps ? s.step / s.steps : 0;
    const facts = [STATES[s.state], s.steps ? `step ${number(s.step)} of ${number(s.steps)}` : `step ${number(s.step)}`, `${number(s.tokens)} tokens`];
    if (s.state !== "finished" && s.seconds_since_row !== null) facts.push(`last row ${ago(s.seconds_since_row)} before this page's numbers`);
    if (s.sampled) facts.push("a sample of the rows; the rest is being read");
    if (s.skipped_lines) facts.push(`${number(s.skipped_lines)} lines are no rows and are left out`);
    return make("article", { class: "card run", "aria-label": visible(run.name) },
      make("h2", {}, visible(run.name), make("small", { text: facts.join(" · ") })),
      s.steps ? make("progress", { max: 1, value: share, "aria-label": `Progress of ${visible(run.name)}` }) : null,
      make("dl", { class: "answers" }, ...run.verdict.map((v) => make("div", { class: `answer ${v.level}` },
        make("dt", { text: v.question }), make("dd", { class: "word", text: visible(v.answer) }), make("dd", {}, ...spelled(v.text))))));
  }));
}

// ---- charts

const line = (run, series, marks) => ({ name: run.name, index: indexOf(run), x: series.x, y: series.y, mean: series.mean, stderr: series.stderr, marks, phases: run.phases });
function lines(pick, marks) {
  return shown().map((run) => [run, pick(run), marks ? run.marks[marks] : null]).filter(([, series]) => series && series.x.length)
    .map(([run, series, spikes]) => line(run, series, spikes));
}
const names = (part) => [...new Set(shown().flatMap((run) => Object.keys(run[part] || {})))];
const own = (object, name) => (Object.hasOwn(object || {}, name) ? object[name] : null);

function fromStart(series) {
  if (!series || !picked.change) return series;
  const first = series.y[0], less = (y) => y.map((v) => v - first);
  return { x: series.x, y: less(series.y), mean: series.mean && { x: series.mean.x, y: less(series.mean.y) } };
}

function specs() {
  const found = [];
  const add = (group, id, title, list, more = {}) => { if (list.length) found.push({ group, id, key: id, title, lines: list, format: number, ...more }); };
  add("Loss", "loss", "Training loss", lines((run) => own(run.series, "loss"), "loss"), { note: "Circles: spikes, far above the 20 steps before.", phases: "shaded" });
  names("val").forEach((domain, i) => {
    const kinds = new Set(shown().map((run) => own(run.val, domain)).filter(Boolean).map((v) => v.kind));
    const note = kinds.has("adaptation") ? "In training: its fall is adaptation." : "Not new text: its rise is forgetting.";
    add("Loss", `val-${i}`, `Validation loss: ${visible(domain)}${picked.change ? ", change from the start" : ""}`, lines((run) => fromStart(own(run.val, domain))), { key: `val ${domain}`, note });
  });
  add("Loss", "teacher", "Distance from the teacher", lines((run) => own(run.series, "teacher")), { zero: true, note: "KL divergence of its predictions from the teacher's." });
  add("Learning rate", "lr", "Learning rate", lines((run) => own(run.series, "lr")), { zero: true, phases: "told", note: "Shaded: the phases of the schedule." });
  found.push({ group: "Routers" });
  add("Balance", "dead", "Dead experts", lines((run) => run.dead_experts), { zero: true, note: "All layers together; below 8 % of the balanced load. The highest of each stretch is kept." });
  names("val_mri").forEach((domain, i) => add("Balance", `val-mri-${i}`, `mri in validation: ${visible(domain)}`, lines((run) => own(run.val_mri, domain)), { key: `val mri ${domain}`, note: "Of the worst layer: the largest share of tokens that one expert gets.", format: percent }));
  names("balance").forEach((name, i) => add("Balance", `balance-${i}`, `Balance loss: ${visible(name)}`, lines((run) => own(run.balance, name)), { key: `balance ${name}` }));
  add("Balance", "grad_norm", "Gradient norm", lines((run) => own(run.series, "grad_norm"), "grad_norm"), { zero: true, note: "Before clipping. Circles: spikes." });
  add("Speed", "tokens_per_second", "Tokens per second", lines((run) => own(run.series, "tokens_per_second")), { zero: true });
  add("Speed", "mfu", "MFU", lines((run) => own(run.series, "mfu")), { zero: true, format: percent });
  add("Speed", "memory", "GPU memory, peak", lines((run) => own(run.series, "memory")), { zero: true, format: bytes });
  documents.scores.forEach((score, i) => {
    const list = documents.runs.filter((run) => !hidden.has(run.name) && Object.hasOwn(score.runs, run.name)).map((run) => line(run, { ...score.runs[run.name], mean: null }));
    add("Scores", `score-${i}`, `${visible(score.task)}: ${visible(score.metric)}`, list, { key: `score ${score.task} ${score.metric}`, note: score.higher_is_better === false ? "Lower is better." : score.higher_is_better ? "Higher is better." : "" });
  });
  return found;
}

let structure = "";
function drawCharts() {
  const wanted = specs(), key = JSON.stringify(wanted.map((spec) => [spec.group, spec.id])) + shown().map((run) => run.name).join("\n");
  if (key === structure) {
    for (const spec of wanted) if (spec.id) drawn.get(spec.id).update(spec);
    drawRouters(byId("routers"));
    return;
  }
  structure = key;
  for (const chart of all) chart.chart.destroy();
  all.clear();
  drawn.clear();
  const host = byId("charts");
  host.replaceChildren();
  byId("scores").replaceChildren();
  let section = null, group = null;
  for (const spec of wanted) {
    if (spec.group === "Routers") {
      const routers = make("section", { id: "routers" });
      host.append(routers);
      drawRouters(routers);
      group = null;
      continue;
    }
    if (spec.group !== group) {
      group = spec.group;
      section = make("div", { class: "charts" });
      (group === "Scores" ? byId("scores") : host).append(make("section", { "aria-label": group }, make("h2", { text: group }), section));
    }
    drawn.set(spec.id, new Chart(section, spec));
  }
}

// ---- sources, options, lineage

function table(head, rows, kind = "") {
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": head.join(", ") }, make("table", { class: kind },
    make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col", text })))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((text) => make("td", { text: visible(text) })))))));
}
const plain = (value) => (Array.isArray(value) ? value.map(plain).join(", ") : value && typeof value === "object" ? Object.entries(value).map(([k, v]) => `${k}=${plain(v)}`).join(" ") : String(value));

const about = (run, ...parts) => make("article", { class: "card run", "aria-label": `About ${visible(run.name)}` }, make("h3", { text: visible(run.name) }), ...parts);

function drawSources() {
  const known = shown().filter((run) => Object.keys(run.sources).length);
  replace(byId("sources"), ...(known.length ? [make("h2", { text: "Sources" })] : []), ...known.map((run) => about(run,
    table(["source", "kind", "tokens", "epochs"], Object.entries(run.sources).map(([name, s]) => [name, s.replay ? "replay" : "new text", number(s.tokens), s.epochs === null ? "–" : s.epochs.toFixed(3)])))));
}

function deadNow(dead, i) {
  const layers = Object.entries(dead), count = layers.reduce((sum, [, experts]) => sum + experts.length, 0);
  if (!count) return null;
  const text = layers.map(([layer, experts]) => `layer ${visible(layer)}: ${experts.join(", ")}`).join("; ");
  if (count < 10) return make("p", { class: "note", text: `Dead in each of the last 20 steps: ${text}` });
  return make("details", { id: `dead-${i}` }, make("summary", { text: `${count} experts dead in each of the last 20 steps` }), make("p", { class: "note", text }));
}

function drawMore() {
  const open = new Set([...document.querySelectorAll("#more details[open]")].map((one) => one.id));
  replace(byId("more"), make("h2", { text: "Command and lineage" }), ...shown().map((run, i) => about(run,
    run.command ? make("pre", {}, ...spelled(run.command)) : null,
    make("p", { class: "note", text: visible(run.path) }),
    deadNow(run.dead_now, i),
    make("details", { id: `options-${i}` }, make("summary", { text: "Options" }), table(["option", "value"], Object.entries(run.options).map(([name, value]) => [name, plain(value)]), "options")),
    run.lineage.length ? make("details", { id: `lineage-${i}` }, make("summary", { text: `Lineage: ${run.lineage.map((entry) => visible(entry.command)).join(" → ")}` }),
      table(["command", "source", "options", "moetool"], run.lineage.map((e) => [e.command, e.source, plain(e.values), e.moetool]), "options")) : null)));
  for (const id of open) if (byId(id)) byId(id).open = true;
}

// ---- all of it

function drawAll() { drawRuns(); drawProblems(); drawVerdict(); drawCharts(); drawSources(); drawMore(); }
function redraw() { for (const one of drawn.values()) if (one instanceof Figure) one.update(one.spec); drawRuns(); }

byId("smoothing").addEventListener("input", (event) => {
  view.smoothing = +event.target.value;
  byId("smoothed").textContent = view.smoothing ? view.smoothing.toFixed(2) : "off";
  for (const chart of all) chart.update(chart.spec);
});
byId("change").addEventListener("click", () => { picked.change = !picked.change; byId("change").setAttribute("aria-pressed", picked.change); drawCharts(); });
byId("reset").addEventListener("click", () => showRange(null, null));
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; redraw(); } });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
addEventListener("beforeprint", () => { document.documentElement.classList.add("print"); redraw(); });
addEventListener("afterprint", () => { document.documentElement.classList.remove("print"); redraw(); });

// What changes is read aloud, so the time stands beside it.
function tellLive(text) {
  if (byId("live").textContent !== text) byId("live").textContent = text;
  byId("when").textContent = `Numbers of ${new Date(documents.made * 1000).toLocaleString()}.`;
}

// Newer numbers wait while a mouse button is down, so that a zoom or a selection is not cut off.
let pressed = false;
addEventListener("pointerdown", () => { pressed = true; }, true);
for (const end of ["pointerup", "pointercancel", "blur"]) addEventListener(end, () => { pressed = false; }, true);
const released = async () => { while (pressed) await new Promise((go) => setTimeout(go, 100)); };

byId("foot").textContent = `Made by moetool ${documents.moetool} from the runs' own files.`;
drawAll();

async function poll() {
  const began = performance.now();
  let answer = null;
  try {
    answer = await fetch(`runs.json?have=${documents.version}`, { cache: "no-store" });
    if (answer.status === 200) documents = await answer.json();
    else if (answer.status !== 204) throw new Error(answer.status);
    tellLive("Live.");
  } catch {
    answer = null;
    tellLive("moetool watch does not answer; trying again.");
  }
  setTimeout(poll, Math.max(documents.every, 10 * (performance.now() - began)));
  if (!answer || answer.status !== 200) return;
  await released();
  try { drawAll(); } catch (error) { tellLive(`The newest numbers could not be drawn: ${error}.`); throw error; }
}
tellLive(documents.every ? "Live." : "");
if (documents.every) setTimeout(poll, documents.every);
