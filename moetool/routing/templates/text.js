// The text of a domain, its tokens coloured by the expert that the chosen layer and rank sent them to.
(() => {
  const element = document.getElementById("text-data");
  if (!element) return;
  const data = JSON.parse(element.textContent), L = data.layers.length, R = data.num_ranks;
  const [domain, layer, rank] = ["domain", "layer", "rank"].map((name) => document.getElementById(`text-${name}`));
  const domains = Object.entries(data.domains);
  const only = [null, null];  // the expert shown alone, of each model

  const unpacked = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  for (const [, one] of domains) {
    for (const model of one.models) {
      const raw = unpacked(model.experts);
      model.expert = data.expert_bytes === 1 ? (i) => raw[i] : (i) => raw[2 * i] + 256 * raw[2 * i + 1];
      const weights = unpacked(model.weights), changed = model.changed && unpacked(model.changed);
      model.weight = (i) => weights[i] * model.weight_scale;
      model.isChanged = (i) => Boolean(changed) && ((changed[i >> 3] >> (7 - (i & 7))) & 1) === 1;
    }
  }
  const place = (token, r) => (token * L + +layer.value) * R + r;
  const shown = () => domains[+domain.value];
  const numbers = document.getElementById("text-numbers");

  // More experts than colours that differ for everyone: those with most routes of the layer, in all domains, have one.
  const COLOURS = +document.getElementById("text-models").dataset.colours;
  let coloured = [];
  function choose() {
    const routes = new Map();
    for (const [, one] of domains) {
      for (const model of one.models) {
        for (let t = 0; t < one.tokens.length; t++) {
          for (let r = 0; r < R; r++) { const expert = model.expert(place(t, r)); routes.set(expert, (routes.get(expert) || 0) + 1); }
        }
      }
    }
    const all = [...routes.keys()].sort((a, b) => a - b), few = all.length === 0 || all[all.length - 1] < COLOURS;
    coloured = few ? Array.from({ length: COLOURS }, (_, e) => e) : all.sort((a, b) => routes.get(b) - routes.get(a) || a - b).slice(0, COLOURS).sort((a, b) => a - b);
  }
  function colour(element, expert) {
    const at = coloured.indexOf(expert);
    element.dataset.expert = expert;
    if (at < 0) element.classList.add("plain"); else element.style.setProperty("--fill", `var(--e${at})`);
  }

  function draw() {
    choose();
    shown()[1].models.forEach(drawModel);
  }

  function drawModel(model, side) {
    const tokens = shown()[1].tokens, counts = new Map(), spans = [];
    tokens.forEach((text, t) => {
      const i = place(t, +rank.value), expert = model.expert(i);
      counts.set(expert, (counts.get(expert) || 0) + 1);
      const span = document.createElement("span");
      span.textContent = text;
      colour(span, expert);
      span.classList.toggle("changed", model.isChanged(i));
      const choices = Array.from({ length: R }, (_, r) => `expert ${model.expert(place(t, r))} (weight ${model.weight(place(t, r)).toFixed(2)}${model.isChanged(place(t, r)) ? ", changed" : ""})`);
      span.dataset.tip = `token ${t + 1} “${text}”, layer ${data.layers[+layer.value]}: ${choices.join(", ")}`;
      span.addEventListener("click", () => pick(side, expert));
      spans.push(span);
      if (text.includes("↵")) spans.push(document.createElement("br"));
    });
    document.getElementById(`text-${side}`).replaceChildren(...spans);
    const order = [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
    document.getElementById(`text-experts-${side}`).replaceChildren(...order.map(([expert, count]) => {
      const button = document.createElement("button");
      button.type = "button";
      colour(button, expert);
      button.textContent = `${expert}: ${count}`;
      button.setAttribute("aria-label", `expert ${expert}, ${count} tokens`);
      button.addEventListener("click", () => pick(side, expert));
      return button;
    }));
    mark(side);
  }

  function pick(side, expert) {
    only[side] = only[side] === expert ? null : expert;
    mark(side);
  }

  function mark(side) {
    for (const span of document.getElementById(`text-${side}`).querySelectorAll("span")) {
      const own = +span.dataset.expert === only[side];
      span.classList.toggle("faded", only[side] !== null && !own);
      span.classList.toggle("picked", own);
    }
    for (const button of document.getElementById(`text-experts-${side}`).children) button.setAttribute("aria-pressed", +button.dataset.expert === only[side]);
  }

  document.getElementById("text-csv").addEventListener("click", () => {
    const rows = shown()[1].models.flatMap((model, side) => shown()[1].tokens.flatMap((text, t) => Array.from({ length: R }, (_, r) => [
      side + 1, t + 1, text, data.layers[+layer.value], r + 1, model.expert(place(t, r)), model.weight(place(t, r)).toFixed(4), +model.isChanged(place(t, r))])));
    window.saveCsv(`text-${shown()[0]}-layer-${data.layers[+layer.value]}`, ["model", "token", "text", "layer", "rank", "expert", "weight", "changed"], rows);
  });
  const number = () => { for (const text of document.querySelectorAll(".text")) text.classList.toggle("numbered", numbers.checked); };
  numbers.addEventListener("change", number);
  number();
  for (const select of [domain, layer, rank]) select.addEventListener("change", () => { only.fill(null); draw(); });
  draw();
})();
