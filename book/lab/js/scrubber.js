// The forgetting scrubber: the names that a model gives to the same test images after each update, for one
// way to update it, or for several among which a slider chooses.
import { button, element, picture, places, roving, say } from "./form.js";
import { axes, d3, drawing, group, handles, join } from "./plane.js";
import { canonical, within } from "./state.js";
import { frame } from "./workbench.js";

const PACE = { many: 700, one: 1000 }; // milliseconds between updates while it plays
const COLOURS = { old: "var(--blue)", new: "var(--green)" };
const intro = (updates) =>
  `A small CLIP can name emoji. Now it is trained on new pictures, in ${updates} updates, and forgets. ` +
  "Choose how much old data each batch replays, and watch which names it keeps and which it learns.";
const POINT = "Point at a picture, or tap it, to read its names in full. Yellow: the name changed in this update.";

export function explore(el, { table, kernel, start }) {
  const { images, new_images: fresh = [], scored, lost } = table;
  const isFirst = Boolean(table.stops);
  const stops = table.stops ?? [{ names: images.map((each) => each.names) }];
  const last = stops[0].names[0].length - 1;
  // what the chart shows of a way to update, in per cent; the largest number beside it is where a line ends
  const linesOf = ({ scores }) =>
    isFirst
      ? [
          { key: "old", percents: scores.map((each) => each.A_ZS) },
          { key: "new", percents: scores.map((each) => each.A_KA) },
        ]
      : [{ key: "old", percents: table.right.map((count) => (100 * count) / scored) }];
  const highest = d3.max(stops.flatMap(linesOf).flatMap((each) => each.percents));
  const when = (update) => (update ? `After update ${update}` : "Before the updates");
  const place = places(el, ["presets", "stops", "tools", "said", "warned", "chart", "scores", "tiles"]);
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
  const acted = (action) => "change" in action || stop(); // Undo and Reset end what plays
  const bench = frame(el, { name, rules, kinds, kernel, start, place, draw, acted });
  const go = (update) => bench.act({ change: { update } });

  // Time
  let timer = null;
  const play = button("Play", () => (timer ? stop() : begin()), { class: "go" });
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
  place.tools.append(...[play, time, named, place.presets].filter(Boolean));

  // The way to update: a share of replay, or another way, beside the slider. One who chooses sees at once where
  // it ends.
  const choose = (chosen) => {
    const { update } = bench.model.state;
    bench.act({ change: { stop: chosen, update: timer || update ? update : last } });
  };
  const ticks = stops.map((each, n) => button(each.stop ?? "", () => choose(n)));
  const isShare = (n) => /^\d+%$/.test(stops[n].stop ?? "");
  const ways = d3.range(stops.length).filter(isShare);
  const others = d3.range(stops.length).filter((n) => !isShare(n));
  const share = slide("Share of replay in each batch", ways.length - 1, (n) => choose(ways[n]));
  // after "the recipe", the slider stands at 0% already, and neither a click there nor a key is an input
  const chooseShown = () => ways.includes(bench.model.state.stop) || choose(ways[Number(share.value)]);
  share.addEventListener("click", chooseShown);
  share.addEventListener("keyup", ({ key }) => ["ArrowLeft", "ArrowDown", "Home"].includes(key) && chooseShown());
  if (isFirst) {
    const row = (all) => element("div", { class: "ticks" }, ...all.map((n) => ticks[n]));
    const [shares, besides] = [row(ways), row(others)];
    const sliding = element("div", {}, element("label", {}, "How much old data is replayed in each batch?"), share, shares);
    place.stops.append(sliding, element("div", {}, element("label", {}, "or another way:"), besides));
    for (const each of [shares, besides]) roving(each, "button");
    place.stops.style.setProperty("--stops", ways.length);
  }

  // A tile for each picture: in the first screen with what the model says, and all else in a line below.
  const side = isFirst ? 48 : 64;
  const told = element("p", { class: "told", "aria-live": "polite" }, POINT);
  let pointed = null; // the tile of which the line below tells
  const tile = (sprite, { truth }, n, kind) => {
    const made = { kind, n, truth, words: element("p"), small: element("small") };
    const words = isFirst ? [made.words, made.small] : [element("b", {}, truth), made.words, made.small];
    const inner = [picture(sprite, n, side, truth), element("div", {}, ...words)];
    made.place = element("li", {}, ...(isFirst ? [element("button", { type: "button" }, ...inner)] : inner));
    const point = () => ((pointed = made), tell());
    for (const event of isFirst ? ["mouseenter", "focusin", "click"] : []) made.place.addEventListener(event, point);
    return made;
  };
  const tiles = [
    ...images.map((image, n) => tile(table.sprite, image, n, "names")),
    ...fresh.map((image, n) => tile(table.new_sprite, image, n, "new_names")),
  ];
  const list = (kind) => element("ul", {}, ...tiles.filter((each) => each.kind === kind).map((each) => each.place));
  const nameAt = ({ kind, n }, update) => stops[bench.model.state.stop][kind][n][update];
  function tell() {
    if (!pointed) return;
    const { update } = bench.model.state;
    const now = nameAt(pointed, update);
    const before = update && nameAt(pointed, update - 1) !== now ? `, before that “${nameAt(pointed, update - 1)}”` : "";
    const verdict = now === pointed.truth ? "which is right" : `but the right name is “${pointed.truth}”`;
    say(told, `${when(update)}, the model says “${now}”, ${verdict}${before}.`);
  }
  const rule = isFirst
    ? table.rule
    : `Shown are ${images.length} of the ${lost} images that lose their right name at least once: from each dataset in turn, in the order of the data. ` +
      `So they do worse than others do; the chart counts all ${scored}.`;

  function drawChart({ stop: chosen, update }) {
    const label = "Share of all scored images that are named right, by update";
    const svg = drawing(place.chart, isFirst ? 230 : 200, label, 640);
    const [width, height] = svg.property("extent");
    const lines = linesOf(stops[chosen]);
    const x = d3.scaleLinear([0, last], [44, width - (isFirst ? 44 : 20)]);
    const y = d3.scaleLinear([0, highest * 1.08], [height - 44, 26]);
    axes(svg, x, y, ["update", isFirst ? "score on all test data (%)" : `named right (% of all ${scored} images)`], Math.min(last, 10));
    join(group(svg, "lines"), "path", lines)
      .attr("class", "now")
      .style("stroke", (d) => COLOURS[d.key])
      .attr("d", (d) => d3.line((_, n) => x(n), y)(d.percents));
    const points = lines.flatMap(({ key, percents }) => percents.map((value, n) => ({ key, value, n })));
    join(group(svg, "dots"), "circle", points)
      .style("fill", (d) => COLOURS[d.key])
      .attr("r", (d) => (d.n === update ? 4.5 : 2.5))
      .attr("cx", (d) => x(d.n))
      .attr("cy", (d) => y(d.value));
    join(group(svg, "ends"), "text", isFirst ? lines : [])
      .attr("x", x(last) + 12)
      .attr("y", (d) => y(d.percents[last]) + 4)
      .text((d) => d.key);
    const [{ percents }] = lines;
    const words = `${when(update)}: ${Math.round(percents[update])}%`;
    const mark = { key: "mark", name: "Update", now: update, least: 0, most: last, words, x: x(update), y: y(percents[update]) };
    handles(group(svg, "knees"), [mark], 8, {
      move: (px) => (stop(), go(x.invert(px))),
      nudge: (across, up) => (stop(), go(bench.model.state.update + across + up)), // keys may outrun a frame
      end: (isLast) => (stop(), go(isLast ? last : 0)),
    });
    svg.on("click", (event) => event.target.closest(".handle") || (stop(), go(x.invert(d3.pointer(event, svg.node())[0]))));
  }

  function draw() {
    const { stop: chosen, update } = bench.model.state;
    const { scores, label, stop: tick } = stops[chosen];
    share.value = Math.max(0, ways.indexOf(chosen));
    share.classList.toggle("off", !ways.includes(chosen));
    share.setAttribute("aria-valuetext", ways.includes(chosen) ? tick : `none: ${tick}`);
    ticks.forEach((each, n) => each.setAttribute("aria-pressed", String(n === chosen)));
    if (time) {
      time.value = update;
      time.setAttribute("aria-valuetext", when(update));
    }
    named.textContent = when(update);
    const isRight = (each, at) => nameAt(each, at) === each.truth;
    for (const each of tiles) {
      const [before, now] = [nameAt(each, update - 1), nameAt(each, update)];
      const moved = update > 0 && before !== now;
      const right = isRight(each, update);
      const look = `${right ? "right" : "wrong"}${moved ? " moved" : ""}`;
      if (each.place.className !== look) each.place.className = look;
      const words = isFirst ? `${right ? "✓" : "✗"} ${now}` : right ? "✓ right" : `✗ wrong: ${now}`;
      if (each.words.textContent !== words) each.words.textContent = words;
      each.small.textContent = isFirst ? (right ? "" : each.truth) : moved ? `changed, was ${before}` : "";
    }
    tell();
    const count = (test, kind = "names") =>
      d3.sum(tiles, (each) => each.kind === kind && test(isRight(each, 0), isRight(each, update)));
    const now = (kind) => count((_, is) => is, kind);
    const since = `, ${count((was, is) => was && !is)} were lost since the start, ${count((was, is) => !was && is)} were gained`;
    const right = `${now("names")} of ${images.length} names are right`;
    const both = `of the pictures shown, ${now("names")} of ${images.length} old and ${now("new_names")} of ${fresh.length} new ones have their right name`;
    say(place.said, isFirst ? `${label}: ${both}.` : `${when(update)}: ${right}${update ? since : ""}.`);
    if (scores) {
      const number = (key, what, colour) => {
        const value = element("b", { style: `color: ${colour}` }, `${Math.round(scores[update][key])}%`);
        return element("div", {}, value, `on all ${what} test data (was ${Math.round(scores[0][key])}%)`);
      };
      place.scores.replaceChildren(number("A_ZS", "old", COLOURS.old), number("A_KA", "new", COLOURS.new));
    }
    drawChart(bench.model.state);
    bench.drawn();
  }

  const how = element("p", { class: "how" }, rule);
  if (isFirst) {
    const moment = element("div", { class: "when" }, place.tools, place.scores);
    const heading = (words) => element("p", { class: "heading" }, words);
    const section = (words, kind) => element("div", {}, heading(words), list(kind));
    const earlier = section(`Old: ${images.length} emoji, all named right before the updates`, "names");
    const later = section(`New: ${fresh.length} pictures, one of each kind that the updates bring`, "new_names");
    place.tiles.append(earlier, element("div", {}, place.chart, later));
    roving(place.tiles, "li > button");
    el.append(element("p", { class: "intro" }, intro(last)), place.stops, moment, place.said, told, place.tiles, place.warned, how);
  } else el.append(place.tools, place.said, place.chart, list("names"), place.warned, how);
  bench.begin();
}
