// The phases of a schedule: each kind has a shade of its own, which the key names.
"use strict";

const BAND = 18;  // CSS pixels of a run's band

const phaseColor = (name) => color(`--phase-${name}`) || color("--shade");
// The training row of step s was made by update s; a phase has the updates after `from`, up to `to`.
const phaseAt = (phases, step) => (phases.find((phase) => phase.from < step && step <= phase.to) || { name: "" }).name;

// Runs of one schedule shade the whole chart, below a band with the names; of several, each has a band in its colour.
function shading(lines, inBands) {
  const known = lines.filter((line) => line.phases.length);
  const same = new Set(lines.map((line) => JSON.stringify(line.phases))).size === 1;
  const bands = same ? known.slice(0, 1) : inBands ? known : [];
  const names = [...new Set(bands.flatMap((line) => line.phases).map((phase) => phase.name))];
  return { whole: same && known.length ? known[0].phases : [], bands, names, room: bands.length * BAND };
}

function shade(u, { whole, bands }) {
  const { left, top, width, height } = u.bbox, ratio = devicePixelRatio || 1, pen = u.ctx;
  pen.save();
  pen.globalAlpha = 0.4;  // lines must stand out
  drawPhases(u, whole, top, height, false);
  pen.globalAlpha = 1;
  bands.forEach((line, i) => {
    const y = top - (bands.length - i) * BAND * ratio;
    drawPhases(u, line.phases, y, (BAND - (whole.length ? 0 : 5)) * ratio, true);
    if (whole.length) return;
    pen.strokeStyle = seriesColor(line.index);
    pen.setLineDash(seriesDash(line.index).map((d) => d * ratio));
    pen.lineWidth = 2 * ratio;
    pen.beginPath(); pen.moveTo(left, y + (BAND - 4) * ratio); pen.lineTo(left + width, y + (BAND - 4) * ratio); pen.stroke();
  });
  pen.restore();
}

function drawPhases(u, phases, top, height, named) {
  const { left, width } = u.bbox, ratio = devicePixelRatio || 1, pen = u.ctx;
  pen.font = `${11 * ratio}px system-ui, sans-serif`;
  for (const phase of phases) {
    const x0 = Math.max(left, u.valToPos(phase.from, "x", true)), x1 = Math.min(left + width, u.valToPos(phase.to, "x", true));
    if (x1 <= x0) continue;
    pen.fillStyle = phaseColor(phase.name);
    pen.fillRect(x0, top, x1 - x0, height);
    pen.fillStyle = color("--ink");
    if (named && x1 - x0 > pen.measureText(phase.name).width + 8 * ratio) pen.fillText(phase.name, x0 + 5 * ratio, top + height - 3 * ratio);
  }
}

const phaseKey = (names) => names.map((name) => make("span", {}, make("i", { class: `phase ${name}` }), visible(name)));
