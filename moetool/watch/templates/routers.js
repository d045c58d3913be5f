// The routers of one run over time, and the load of the experts of one of its layers.
"use strict";

const MEASURES = {
  mri: ["mri: largest share of tokens that one expert gets", percent],
  entropy: ["entropy of the load: 1 is balanced, 0 is one expert", number],
  dead_experts: ["dead experts", number],
};

// The ends of the colours of a measure, of layers with E experts of which a token takes K.
function scalesOf(measure, E, K, values) {
  const balanced = E ? K / E : 0, most = E || Math.max(1, ...values.flat());
  const scale = (low, high, lowName, highName) => ({ low, high, lowName, highName });
  return {
    mri: { linear: scale(balanced, 1, E ? `${percent(balanced)}, balanced` : "0 %", "100 %"), log: scale(balanced || 0.001, 1, E ? `${percent(balanced)}, balanced` : "0.1 % or less", "100 %") },
    entropy: { linear: scale(0, 1, "0", "1, balanced"), log: scale(0.001, 1, "0.001 or less", "1, balanced") },
    dead_experts: { linear: scale(0, most, "0", String(most)), log: scale(0.5, most, "0", String(most)) },
  }[measure];
}

const select = (name, onchange) => make("select", { "aria-label": name, onchange: (event) => onchange(event.target.value) });
function offer(element, options, value) {
  replace(element, ...options.map(([one, text]) => make("option", { value: one, text })));
  element.value = value;
}

// The layer that the user chose, as long as the run has it, or else the one with the largest mri now.
function layerOf(routers) {
  const chosen = routers.layers.indexOf(picked.layer), now = routers.mri.map((values) => values[values.length - 1]);
  return chosen >= 0 ? chosen : now.indexOf(Math.max(...now));
}

function drawRouters(host) {
  const runs = shown().filter((run) => run.routers.x && run.routers.x.length);
  if (!runs.length) { host.replaceChildren(); return; }
  const run = runs.find((one) => one.name === picked.run) || runs[0], routers = run.routers, layer = layerOf(routers);
  const values = routers[picked.measure], draw = () => drawRouters(host);
  const spec = {
    id: "routers-heat", key: "routers", title: `Routers of ${visible(run.name)}: layer × step`, rowName: "layer",
    note: `${MEASURES[picked.measure][0]}. Each column shows the worst step of those that it stands for. Click a layer, or choose it with Enter, for the load of its experts.`,
    rows: routers.layers, x: routers.x, values, format: MEASURES[picked.measure][1], scales: scalesOf(picked.measure, routers.num_experts, routers.top_k, values),
    smallest: picked.measure === "entropy", picked: layer, pick: (one) => { picked.layer = routers.layers[one]; draw(); },
  };
  if (!drawn.has("routers-heat")) {
    const which = select("Run whose routers are shown", (name) => { picked.run = name; draw(); });
    const measure = select("Measure of the routers", (name) => { picked.measure = name; draw(); });
    const chosen = select("Layer whose experts are shown", (name) => { picked.layer = name || null; draw(); });
    const grid = make("div", { class: "charts" }), place = make("div", { class: "wide" });
    host.replaceChildren(make("h2", { text: "Routers" }), grid);
    drawn.set("routers-heat", new Heat(grid, spec, which, measure, chosen));
    drawn.set("routers-controls", { which, measure, chosen, place });
    grid.append(place);
  } else drawn.get("routers-heat").update(spec);
  const { which, measure, chosen, place } = drawn.get("routers-controls");
  offer(which, runs.map((one) => [one.name, visible(one.name)]), run.name);
  which.hidden = runs.length < 2;
  offer(measure, Object.keys(MEASURES).map((name) => [name, name.replace("_", " ")]), picked.measure);
  const named = routers.layers.includes(picked.layer);
  offer(chosen, [["", "worst layer now"], ...routers.layers.map((name) => [name, `layer ${visible(name)}`])], named ? picked.layer : "");
  drawLoad(place, loadSpec(run, routers.layers[layer], named ? "" : "The layer with the largest mri now. "));
}

// Runs may have loads or not, and a run may get them.
function drawLoad(place, load) {
  if (load && drawn.has("routers-load")) drawn.get("routers-load").update(load);
  else if (load) { place.replaceChildren(); drawn.set("routers-load", new Heat(place, load)); }
  else {
    drawn.delete("routers-load");
    place.replaceChildren(make("p", { class: "note", text: "The rows of this run hold no loads of single experts: an earlier version of moetool wrote them." }));
  }
}

function loadSpec(run, layer, why) {
  const steps = own(run.load.layers, layer);
  if (!steps) return null;
  const E = steps[0].length, values = Array.from({ length: E }, (_, e) => steps.map((load) => load[e])), high = Math.min(1, 3 / E);
  return {
    id: "routers-load", key: "load", title: `Load of the experts of layer ${visible(layer)}, ${visible(run.name)}`, rowName: "expert", rows: Array.from({ length: E }, (_, e) => String(e)),
    note: `${why}Share of the layer's routes; balance is ${percent(1 / E)}.`, x: run.load.x, values, format: percent, picked: null, pick: null,
    scales: {
      linear: { low: 0, high, lowName: "0 %", highName: `${percent(high)}${high < 1 ? " or more" : ""}` },
      log: { low: 0.01 / E, high: 1, lowName: `${percent(0.01 / E)} or less`, highName: "100 %" },
    },
  };
}
