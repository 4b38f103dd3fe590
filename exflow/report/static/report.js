// Choosers, the affinity's images, and what a heat map's cell holds. It asks no one for anything.
// Without it the page shows all panels, and of the affinities the first.
(() => {
"use strict";
const $ = (selector, from = document) => from.querySelector(selector);
document.documentElement.classList.add("js");

for (const select of document.querySelectorAll("select[data-panels]")) {
  const panels = [...document.getElementById(select.dataset.panels).children];
  const show = () => panels.forEach((panel, place) => { panel.hidden = place !== select.selectedIndex; });
  select.addEventListener("change", show);
  show();
}

const heatOf = new WeakMap();
const told = (image) => {
  if (!heatOf.has(image)) heatOf.set(image, JSON.parse(image.dataset.heat));
  return heatOf.get(image);
};

const choice = $("#affinity-choice");
if (choice) {
  const {pixels, labels, cuts} = JSON.parse($("#affinity-images").textContent);
  const svg = $("#fig-affinity svg"), image = $("image[data-heat]", svg), lines = $("path[data-side]", svg);
  const order = $("select", choice), pair = $("input", choice), output = $("output", choice);
  const ticks = svg.querySelectorAll("text[data-row],text[data-column]");
  const pairs = JSON.parse(pair.dataset.pairs);
  const corner = lines.dataset, x = +corner.x, y = +corner.y, side = +corner.side;
  const at = (list, place) => list[Math.min(place, list.length - 1)];
  const brief = (label) => label.replace("GPU ", "G").replace(/[ -].*/, "");
  const show = () => {
    const o = order.selectedIndex, p = +pair.value, heat = told(image);
    heat.rows = at(labels[o], p);
    heat.columns = at(labels[o], p + 1);
    image.setAttribute("href", pixels[o][p]);
    for (const tick of ticks) {
      const {row, column} = tick.dataset;
      tick.textContent = row === undefined ? brief(heat.columns[column]) : heat.rows[row];
    }
    const across = (share) => `M${x} ${y + side * share}h${side}`;
    const down = (share) => `M${x + side * share} ${y}v${side}`;
    const cut = (layer, draw) => (cuts[o][layer] || "").split(" ").filter(Boolean).map(draw).join("");
    lines.setAttribute("d", cut(p, across) + cut(p + 1, down));
    output.textContent = pairs[p];
    pair.setAttribute("aria-valuetext", `layers ${pairs[p]}`);
    $(".which", svg).textContent = `layers ${pairs[p]}, ${order.value}`;
  };
  order.addEventListener("change", show);
  pair.addEventListener("input", show);
  show();
}

const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
document.body.append(tip);
const decoded = new Map();
const levels = (address) => {
  if (!decoded.has(address)) {
    decoded.set(address, new Promise((done) => {
      const image = new Image();
      image.onload = () => {
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [image.width, image.height];
        const context = canvas.getContext("2d");
        context.drawImage(image, 0, 0);
        done(context.getImageData(0, 0, image.width, image.height));
      };
      image.src = address;
    }));
  }
  return decoded.get(address);
};
document.addEventListener("scroll", () => { tip.hidden = true; }, {passive: true});
document.addEventListener("pointermove", async (event) => {
  const image = event.target.closest && event.target.closest("image[data-heat]");
  if (!image) { tip.hidden = true; return; }
  const heat = told(image), box = image.getBoundingClientRect();
  const {width, height, data} = await levels(image.getAttribute("href"));
  const place = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
  const row = place((event.clientY - box.top) / box.height, height);
  const column = place((event.clientX - box.left) / box.width, width);
  const [level, , , alpha] = data.slice(4 * (row * width + column));
  const value = heat.low + (level - 1) / 254 * (heat.high - heat.low);
  const about = level === 255 ? "at least" : "about";
  const amount = alpha ? `${about} ${value.toPrecision(3)} ${heat.unit}` : "nothing here";
  tip.textContent = `${heat.row}: ${heat.rows[row]}; ${heat.column}: ${heat.columns[column]}; ${amount}`;
  tip.hidden = false;
  tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
});
})();
