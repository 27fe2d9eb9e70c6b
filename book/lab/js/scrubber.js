// The forgetting scrubber: the names that a model gives to the same test images after each update.
import { button, element } from "./form.js";
import { axes, d3, drawing, group, handles, join } from "./plane.js";
import { linked, within } from "./state.js";

const SIDE = 64; // pixels of a picture, which has half as many
const PACE = 1000; // milliseconds between updates while it plays

export function explore(el, { table: { images, right, scored, lost, sprite }, start }) {
  const last = right.length - 1;
  const isRight = ({ truth, names }, update) => names[update] === truth;
  const percent = right.map((count) => (100 * count) / scored);
  const when = (update) => (update ? `After update ${update}` : "Before the stream");
  let update = 0;
  let timer = null;

  const range = element("input", {
    type: "range",
    min: 0,
    max: last,
    step: 1,
    "aria-label": "Update",
    oninput: () => go(Number(range.value)),
  });
  const play = button("Play", () => (timer ? stop() : begin()));
  const named = element("output");
  const said = element("p", { class: "said", "aria-live": "polite" });
  const chart = element("div", { class: "chart" });
  const cards = images.map(({ truth }, n) => {
    const style = `background: #fff url(${sprite}) -${n * SIDE}px 0 / auto ${SIDE}px`;
    const label = `A test image of ${truth}`;
    const picture = element("div", { class: "picture", role: "img", "aria-label": label, style });
    const words = element("div", {}, element("b", {}, truth), element("p"), element("small"));
    return element("li", {}, picture, words);
  });
  const rule =
    `Shown are ${images.length} of the ${lost} images that lose their right name at least once: from each dataset in turn, in the order of the data. ` +
    `So they do worse than others do; the chart counts all ${scored}.`;

  function begin() {
    if (update === last) go(0);
    timer = setInterval(() => {
      go(update + 1);
      if (update === last || !el.isConnected) stop();
    }, PACE);
    play.textContent = "Pause";
  }
  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }
  function go(to) {
    update = Math.min(last, Math.max(0, to));
    show();
  }

  function draw() {
    const svg = drawing(chart, 200, "Share of all scored images that are named right, by update", 640);
    const [width, height] = svg.property("extent");
    const x = d3.scaleLinear([0, last], [44, width - 20]);
    const y = d3.scaleLinear([0, Math.max(...percent) * 1.08], [height - 44, 26]);
    axes(svg, x, y, ["update", `named right (% of all ${scored} images)`], Math.min(last, 10));
    const line = d3.line((_, n) => x(n), y);
    join(group(svg, "lines"), "path", [percent]).attr("class", "now").attr("d", line);
    svg
      .selectAll("circle.each")
      .data(percent)
      .join("circle")
      .attr("class", "each")
      .attr("r", 3)
      .attr("cx", (_, n) => x(n))
      .attr("cy", y);
    const words = `${when(update)}: ${Math.round(percent[update])}%`;
    const mark = { key: "mark", name: "Update", now: update, least: 0, most: last, words, x: x(update), y: y(percent[update]) };
    handles(group(svg, "knees"), [mark], 8, {
      move: (px) => go(Math.round(x.invert(px))),
      nudge: (across, up) => go(update + across + up),
    });
  }

  function show() {
    range.value = update;
    range.setAttribute("aria-valuetext", when(update));
    named.textContent = when(update);
    images.forEach((image, n) => {
      const before = image.names[update - 1];
      const moved = update > 0 && before !== image.names[update];
      const [, words] = cards[n].children;
      cards[n].className = `${isRight(image, update) ? "right" : "wrong"}${moved ? " moved" : ""}`;
      words.children[1].textContent = isRight(image, update) ? "✓ right" : `✗ wrong: ${image.names[update]}`;
      words.children[2].textContent = moved ? `changed, was ${before}` : "";
    });
    const count = (test) => d3.sum(images, (image) => test(isRight(image, 0), isRight(image, update)));
    const since = `, ${count((was, is) => was && !is)} were lost since the start, ${count((was, is) => !was && is)} were gained`;
    said.textContent = `${when(update)}: ${count((_, is) => is)} of ${images.length} names are right${update ? since : ""}.`;
    draw();
  }

  el.classList.add("explorer", "scrubber");
  el.append(
    element("div", { class: "tools" }, play, range, named),
    said,
    chart,
    element("ul", {}, ...cards),
    element("p", { class: "how" }, rule),
  );
  const [found] = linked(location.href, "scrubber", { update: within([0, last]) }) ?? [start];
  go(found?.update ?? 0);
  new ResizeObserver(draw).observe(range.parentNode);
  el.dataset.ready = "";
}
