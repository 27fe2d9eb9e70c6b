// The forgetting scrubber: the names that a model gives to the same test images after each update, for one
// way to update it, or for several among which a slider chooses.
import { button, element, places, roving, say } from "./form.js";
import { axes, d3, drawing, group, handles, join } from "./plane.js";
import { canonical, within } from "./state.js";
import { frame } from "./workbench.js";

const PACE = { many: 450, one: 1000 }; // milliseconds between updates while it plays

export function explore(el, { table, kernel, start }) {
  const { images, sprite, scored, lost } = table;
  const stops = table.stops ?? [{ names: images.map((each) => each.names), right: table.right }];
  const isFirst = stops.length > 1;
  const last = stops[0].right.length - 1;
  const percents = stops.map(({ right }) => right.map((count) => (100 * count) / scored));
  const when = (update) => (update ? `After update ${update}` : "Before the updates");
  const place = places(el, ["presets", "stops", "tools", "said", "warned", "chart", "scores"]);
  el.classList.add("scrubber");
  el.classList.toggle("first", isFirst);

  const rules = {
    defaults: { stop: table.begins ?? 0, update: 0 },
    settle: ({ stop, update }) => ({ stop, update: Math.max(0, Math.min(last, Math.round(update))) }),
    keyOf: canonical,
  };
  const whole = (most) => (value) => Number.isInteger(value) && within([0, most])(value);
  const kinds = { stop: whole(stops.length - 1), update: whole(last) };
  const name = isFirst ? "first" : "scrubber";
  const bench = frame(el, { name, rules, kinds, kernel, start, place, draw });
  const go = (update) => bench.act({ change: { update } });

  // Time
  let timer = null;
  const play = button("Play", () => (timer ? stop() : begin()));
  function begin() {
    if (bench.model.state.update === last) go(0);
    timer = setInterval(
      () => {
        go(bench.model.state.update + 1);
        if (bench.model.state.update === last || !el.isConnected) stop();
      },
      isFirst ? PACE.many : PACE.one,
    );
    play.textContent = "Pause";
  }
  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }
  const named = element("output");
  const slide = (label, most, set) =>
    element("input", { type: "range", min: 0, max: most, step: 1, "aria-label": label, oninput: (event) => set(Number(event.target.value)) });
  const time = isFirst ? null : slide("Update", last, (update) => (stop(), go(update)));
  place.tools.append(...[play, time, named].filter(Boolean));

  // The way to update. One who chooses sees at once where it ends.
  const choose = (stop_) => {
    const { update } = bench.model.state;
    bench.act({ change: { stop: stop_, update: timer || update ? update : last } });
  };
  const share = slide("Share of replay in each batch", stops.length - 1, choose);
  const ticks = stops.map((each, n) => button(each.stop ?? "", () => choose(n)));
  if (isFirst) {
    const row = element("div", { class: "ticks" }, ...ticks);
    place.stops.append(element("label", {}, "How much old data is replayed in each batch?"), share, row);
    roving(row, "button");
  }

  const side = isFirst ? 48 : 64;
  const cards = images.map(({ truth }, n) => {
    const style = `background: #fff url(${sprite}) -${n * side}px 0 / auto ${side}px`;
    const label = `A picture of ${truth}`;
    const picture = element("div", { class: "picture", role: "img", "aria-label": label, title: truth, style });
    const words = isFirst ? [element("p")] : [element("b", {}, truth), element("p"), element("small")];
    return element("li", {}, picture, element("div", {}, ...words));
  });
  const list = element("ul", {}, ...cards);
  const rule = isFirst
    ? `${table.rule} The numbers count all ${scored} scored pictures of old kinds.`
    : `Shown are ${images.length} of the ${lost} images that lose their right name at least once: from each dataset in turn, in the order of the data. ` +
      `So they do worse than others do; the chart counts all ${scored}.`;

  function drawChart({ stop: chosen, update }) {
    const label = "Share of all scored images that are named right, by update";
    const svg = drawing(place.chart, isFirst ? 230 : 200, label, 640);
    const [width, height] = svg.property("extent");
    const percent = percents[chosen];
    const x = d3.scaleLinear([0, last], [44, width - 20]);
    const y = d3.scaleLinear([0, d3.max(percents.flat()) * 1.08], [height - 44, 26]);
    axes(svg, x, y, ["update", isFirst ? "old pictures named right (%)" : `named right (% of all ${scored} images)`], Math.min(last, 10));
    const line = d3.line((_, n) => x(n), y);
    join(group(svg, "others"), "path", isFirst ? percents : []).attr("d", line);
    join(group(svg, "lines"), "path", [percent]).attr("class", "now").attr("d", line);
    join(group(svg, "dots"), "circle", percent)
      .attr("class", "each")
      .attr("r", isFirst ? 2 : 3)
      .attr("cx", (_, n) => x(n))
      .attr("cy", y);
    const words = `${when(update)}: ${Math.round(percent[update])}%`;
    const mark = { key: "mark", name: "Update", now: update, least: 0, most: last, words, x: x(update), y: y(percent[update]) };
    handles(group(svg, "knees"), [mark], 8, {
      move: (px) => (stop(), go(x.invert(px))),
      nudge: (across, up) => (stop(), go(bench.model.state.update + across + up)), // keys may outrun a frame
    });
  }

  function draw() {
    const { stop: chosen, update } = bench.model.state;
    const { names, scores, label, stop: tick } = stops[chosen];
    const isRight = (n, at) => names[n][at] === images[n].truth;
    share.value = chosen;
    share.setAttribute("aria-valuetext", tick ?? "");
    ticks.forEach((each, n) => each.setAttribute("aria-pressed", String(n === chosen)));
    if (time) {
      time.value = update;
      time.setAttribute("aria-valuetext", when(update));
    }
    named.textContent = when(update);
    cards.forEach((card, n) => {
      const [before, now] = [names[n][update - 1], names[n][update]];
      const moved = update > 0 && before !== now;
      const parts = card.lastChild.children;
      const right = isRight(n, update);
      card.className = `${right ? "right" : "wrong"}${moved ? " moved" : ""}`;
      if (isFirst) return (parts[0].textContent = `${right ? "✓" : "✗"} ${now}`);
      parts[1].textContent = right ? "✓ right" : `✗ wrong: ${now}`;
      parts[2].textContent = moved ? `changed, was ${before}` : "";
    });
    const count = (test) => d3.sum(images, (_, n) => test(isRight(n, 0), isRight(n, update)));
    const since = `, ${count((was, is) => was && !is)} were lost since the start, ${count((was, is) => !was && is)} were gained`;
    const right = `${count((_, is) => is)} of ${images.length} names are right`;
    say(place.said, isFirst ? `${label}: ${right}.` : `${when(update)}: ${right}${update ? since : ""}.`);
    if (scores) {
      const [now, first] = [scores[update], scores[0]];
      const number = (value, words) => element("div", {}, element("b", {}, `${Math.round(value)}%`), words);
      const old = number(now.A_ZS, `of what is old (was ${Math.round(first.A_ZS)}%)`);
      place.scores.replaceChildren(old, number(now.A_KA, `of what is new (was ${Math.round(first.A_KA)}%)`));
    }
    drawChart(bench.model.state);
  }

  const how = element("p", { class: "how" }, rule);
  if (isFirst) {
    place.stops.style.setProperty("--stops", stops.length);
    const now = element("div", { class: "when" }, place.tools, place.said);
    const beside = element("div", {}, place.scores, place.chart);
    el.append(place.stops, now, element("div", { class: "halves" }, list, beside), place.warned, how);
  } else el.append(place.tools, place.said, place.chart, list, place.warned, how);
  bench.begin();
  // it plays once, where the reader can see it and does not mind
  const minds = matchMedia("(prefers-reduced-motion: reduce)").matches || location.hash.includes("explorer=");
  if (isFirst && !minds && "IntersectionObserver" in window) {
    const seen = new IntersectionObserver(([entry]) => {
      if (!entry.isIntersecting) return;
      seen.disconnect();
      begin();
    });
    seen.observe(list);
  }
}
