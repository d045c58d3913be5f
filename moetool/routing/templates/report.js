// Values on hover or touch, and the co-activation of the chosen domain and layer. All text enters the
// page as textContent.
(() => {
  const tip = document.getElementById("tip");
  const percent = (v) => (100 * v).toFixed(v < 0.0995 ? 1 : 0) + " %";

  function describe(cell) {
    if (cell.dataset.tip) return cell.dataset.tip;
    const heat = cell.closest(".heat[data-balanced]");
    if (!heat || cell.dataset.v === undefined) return "";
    const experts = +heat.dataset.experts;
    const place = [...heat.querySelectorAll("i")].indexOf(cell);
    const layer = JSON.parse(heat.dataset.layers)[Math.floor(place / experts)];
    const times = +cell.dataset.v / +heat.dataset.balanced;
    return `layer ${layer}, expert ${place % experts}: load ${percent(+cell.dataset.v)}, ${times.toFixed(2)} × balanced`
      + (cell.classList.contains("dead") ? ", dead" : "");
  }

  function show(event) {
    tell(event.target.closest && event.target.closest("[data-v], [data-tip]"), event.clientX, event.clientY);
  }

  window.showTip = (cell) => {
    const box = cell.getBoundingClientRect();
    tell(cell, box.right - 10, box.bottom);
  };

  function tell(cell, left, top) {
    const text = cell ? describe(cell) : "";
    tip.classList.toggle("on", Boolean(text));
    if (!text) return;
    tip.textContent = text;
    const x = Math.min(left + 14, innerWidth - tip.offsetWidth - 8);
    const y = top > innerHeight - 60 ? top - 40 - tip.offsetHeight / 2 : top + 18;
    tip.style.left = Math.max(8, x) + "px";
    tip.style.top = y + "px";
  }
  for (const kind of ["pointerover", "pointermove", "pointerdown"]) document.addEventListener(kind, show);
  document.addEventListener("scroll", () => tip.classList.remove("on"), { passive: true });

  const data = JSON.parse(document.getElementById("coactivation").textContent);
  const board = document.getElementById("together");
  if (!data || !board) return;
  const [domain, layer] = [document.getElementById("together-domain"), document.getElementById("together-layer")];

  function draw() {
    const row = data[+domain.value][layer.value];
    const experts = row.matrix.length;
    const cells = [document.createElement("b")];
    for (let j = 0; j < experts; j++) cells.push(label(j, "top"));
    row.matrix.forEach((shares, i) => {
      cells.push(label(i, ""));
      shares.forEach((share, j) => cells.push(cell(i, j, share, row.expected[i][j])));
    });
    board.replaceChildren(...cells);
    board.style.setProperty("--columns", experts);
    board.classList.toggle("dense", experts > 24);
  }

  function label(expert, kind) {
    const b = document.createElement("b");
    b.className = kind;
    b.textContent = expert % (data[+domain.value][layer.value].matrix.length > 24 ? 8 : 1) ? "" : expert;
    return b;
  }

  function cell(i, j, share, expected) {
    const box = document.createElement("i");
    if (i === j) { box.className = "self"; return box; }
    const ratio = expected > 0 ? share / expected : 1;
    box.className = ratio >= 1 ? "hot" : "cold";
    box.style.setProperty("--p", Math.min(100, 50 * Math.abs(Math.log2(Math.max(ratio, 0.01)))) + "%");
    box.dataset.tip = `expert ${j} joins expert ${i} for ${percent(share)} of its tokens; by chance ${percent(expected)}`;
    return box;
  }

  window.together = () => data[+domain.value][layer.value];
  for (const select of [domain, layer]) select.addEventListener("change", draw);
  draw();
})();
