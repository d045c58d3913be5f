// Elements, numbers, colours, and saving as PNG and CSV. All text enters the page as textContent.
"use strict";

const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3], [5, 2], [1, 2], [12, 4, 2, 4, 2, 4], [6, 6]];
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
const percent = (value) => (value && Math.abs(value) < 1e-3 ? (100 * value).toPrecision(2) : (100 * value).toFixed(1)) + " %";
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
    if (style && style.fill) {
      pen.fillStyle = style.fill;
      pen.fillRect(8 * ratio, y - 10 * ratio, 28 * ratio, 12 * ratio);
    } else if (style) {
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

// Put other children into an element unless they look the same: what is focused or selected there stays so.
function replace(host, ...children) {
  const looks = children.map((child) => child.outerHTML).join("") + color("--s0");
  if (host.looks === looks) return;
  host.looks = looks;
  host.replaceChildren(...children);
}
