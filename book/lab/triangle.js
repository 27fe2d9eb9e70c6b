// A triangle of three shares that sum to one: drag the handle, click a stored mixture, or use the
// arrow keys. model.value is [P, D, B]; model.points are stored mixtures, {shares, name}.
const SVG = "http://www.w3.org/2000/svg";
const CORNERS = [[160, 34], [34, 252], [286, 252]];
const NAMES = ["Pool P", "Update D", "Buffer B"];
const STEP = 0.05;

function make(name, attributes, parent, text) {
  const found = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
  if (text !== undefined) found.textContent = text;
  parent.appendChild(found);
  return found;
}

function place(shares) {
  return [0, 1].map((axis) => shares.reduce((sum, s, k) => sum + s * CORNERS[k][axis], 0));
}

function shares_at(x, y) {
  const [[ax, ay], [bx, by], [cx, cy]] = CORNERS;
  const area = (by - cy) * (ax - cx) + (cx - bx) * (ay - cy);
  const p = ((by - cy) * (x - cx) + (cx - bx) * (y - cy)) / area;
  const d = ((cy - ay) * (x - cx) + (ax - cx) * (y - cy)) / area;
  return rounded([p, d, 1 - p - d]);
}

// Whole steps that sum to one: what rounding leaves over goes to the largest share.
function rounded(shares) {
  const positive = shares.map((s) => Math.max(0, s));
  const total = positive.reduce((a, b) => a + b, 0);
  const whole = Math.round(1 / STEP);
  const steps = positive.map((s) => Math.round((s / total) * whole));
  steps[steps.indexOf(Math.max(...steps))] += whole - steps.reduce((a, b) => a + b, 0);
  return steps.map((s) => s / whole);
}

function words(shares) {
  return shares.map((s, k) => `${NAMES[k]} ${Math.round(100 * s)} %`).join(", ");
}

function render({ model, el }) {
  const svg = make("svg", { viewBox: "0 0 320 290", width: 320, height: 290 }, el);
  svg.style.cssText = "touch-action: none; user-select: none; font: 13px sans-serif";
  const outline = CORNERS.map((corner) => corner.join(",")).join(" ");
  const ink = "var(--jp-ui-font-color1, #222)";
  make("polygon", { points: outline, fill: "#8883", stroke: ink }, svg);
  for (let k = 0; k < 3; k++) {
    for (const level of [0.25, 0.5, 0.75]) {
      const ends = [1, 2].map((other) => {
        const shares = [0, 0, 0];
        shares[k] = level;
        shares[(k + other) % 3] = 1 - level;
        return place(shares);
      });
      const [[x1, y1], [x2, y2]] = ends;
      make("line", { x1, y1, x2, y2, stroke: "#8886" }, svg);
    }
    const [x, y] = CORNERS[k];
    const dy = k === 0 ? -12 : 22;
    make("text", { x, y: y + dy, "text-anchor": "middle", fill: ink }, svg, NAMES[k]);
  }
  for (const { shares, name } of model.get("points")) {
    const [cx, cy] = place(shares);
    const dot = make("circle", { cx, cy, r: 5, fill: "#0173b2", class: "stored" }, svg);
    dot.style.cursor = "pointer";
    make("title", {}, dot, `${name}: ${words(shares)}`);
    dot.addEventListener("click", () => choose(shares));
  }
  const handle = make("circle", {
    r: 10, fill: "#de8f05aa", stroke: ink, "stroke-width": 2, tabindex: 0, role: "slider",
    "aria-label": "Mixture of a batch", "aria-valuemin": 0, "aria-valuemax": 100, class: "handle",
  }, svg);
  handle.style.cursor = "grab";

  function draw(shares) {
    const [cx, cy] = place(shares);
    handle.setAttribute("cx", cx);
    handle.setAttribute("cy", cy);
    handle.setAttribute("aria-valuenow", Math.round(100 * shares[0]));
    handle.setAttribute("aria-valuetext", words(shares));
  }

  function choose(shares) {
    model.set("value", shares);
    model.save_changes();
  }

  let held = null;
  function moved(event) {
    const box = svg.getBoundingClientRect();
    const scale = 320 / box.width;
    held = shares_at((event.clientX - box.left) * scale, (event.clientY - box.top) * scale);
    draw(held);
  }
  handle.addEventListener("pointerdown", (event) => {
    handle.setPointerCapture(event.pointerId);
    held = model.get("value");
  });
  handle.addEventListener("pointermove", (event) => {
    if (held) moved(event);
  });
  handle.addEventListener("pointerup", () => {
    if (held) choose(held);
    held = null;
  });
  // Up and down: more of the pool, from the larger of the others, or less of it, to the smaller;
  // left and right: from the buffer to the update, and back. [from, to], as places in the shares.
  const MOVES = {
    ArrowUp: ([, d, b]) => [d >= b ? 1 : 2, 0], ArrowDown: ([, d, b]) => [0, d <= b ? 1 : 2],
    ArrowLeft: () => [2, 1], ArrowRight: () => [1, 2],
  };
  handle.addEventListener("keydown", (event) => {
    if (!(event.key in MOVES)) return;
    event.preventDefault();
    event.stopPropagation();
    const shares = rounded(model.get("value"));
    const [from, to] = MOVES[event.key](shares);
    const some = Math.min(STEP, shares[from]);
    choose(rounded(shares.map((s, k) => s + some * ((k === to) - (k === from)))));
  });
  const update = () => draw(model.get("value"));
  model.on("change:value", update);
  update();
  return () => model.off("change:value", update);
}

export default { render };
