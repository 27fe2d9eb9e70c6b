// The page around a text: chapters, outline, search, what comes before and after, the bibliography.
import { escape, indexed, plain } from "./html.mjs";
import { render } from "./render.mjs";

const DEPTH = 4; // headings down to this level stand in the outline

function chapters(project, slug, base) {
  const rows = project.pages.map((each) => {
    if (each.slug == null) return `<li class="part">${escape(each.title)}</li>`;
    const here = each.slug === slug ? ' aria-current="page"' : "";
    return `<li><a href="${base}/${each.slug}"${here}>${escape(each.short_title ?? each.title)}</a></li>`;
  });
  const here = slug === "" ? ' aria-current="page"' : "";
  return `<nav class="chapters" id="chapters" aria-label="Chapters"><ul><li><a href="${base}/"${here}>Start</a></li>${rows.join("")}</ul></nav>`;
}

function headings(node) {
  if (node.type === "heading") return node.depth <= DEPTH && node.html_id ? [node] : [];
  return (node.children ?? []).flatMap(headings);
}

function outline(page) {
  const rows = headings(page.mdast).map(
    (each) =>
      `<li class="level${each.depth}"><a href="#${escape(each.html_id)}">${indexed(escape(plain(each)))}</a></li>`,
  );
  if (rows.length < 2) return '<div class="outline"></div>';
  return `<nav class="outline" aria-label="On this page"><p>On this page</p><ul>${rows.join("")}</ul></nav>`;
}

function neighbours(project, slug, base) {
  const all = [{ slug: "", title: "Start" }, ...project.pages.filter((each) => each.slug)];
  const at = all.findIndex((each) => each.slug === slug);
  const link = (each, way, words) =>
    each
      ? `<a rel="${way}" href="${base}/${each.slug}"><span>${words}</span>${escape(each.title)}</a>`
      : "<span></span>";
  return `<nav class="neighbours" aria-label="Previous and next">${link(all[at - 1], "prev", "Previous")}${link(all[at + 1], "next", "Next")}</nav>`;
}

function bibliography({ references }) {
  const { order = [], data = {} } = references?.cite ?? {};
  if (!order.length) return "";
  // As texts cite them: by name and year, so without numbers, and "et al." for further authors.
  const words = (key) => data[key].html.replace(/,? (?:&amp;|&) others\b\.?/, ", <i>et al.</i>");
  const rows = order.map((key) => `<li id="cite-${escape(key)}">${words(key)}</li>`);
  return `<section class="bibliography"><h2 id="bibliography">References</h2><ul>${rows.join("")}</ul></section>`;
}

function scripts(context, base) {
  const found = [`<script src="${base}/book.js" defer></script>`];
  if (context.answers) found.push(`<script type="module" src="${base}/explorers/page.js"></script>`);
  return found.join("\n");
}

function head(page, project, base) {
  const title = page.frontmatter?.title ?? project.title;
  const both = title === project.title ? title : `${title} | ${project.title}`;
  const about = page.frontmatter?.description || project.description || "";
  return `<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>${escape(both)}</title>
<meta name="description" content="${escape(about)}">
<link rel="icon" href="${base}/favicon.svg" type="image/svg+xml">
<link rel="stylesheet" href="${base}/vendor/katex/katex.min.css">
<link rel="stylesheet" href="${base}/myst-theme.css">
<script>try { document.documentElement.dataset.theme = localStorage.getItem("theme") ?? "" } catch {}</script>`;
}

function bar(project, base) {
  return `<header class="bar">
<button class="menu" type="button" aria-controls="chapters" aria-expanded="false" aria-label="Chapters"><svg width="20" height="20" viewBox="0 0 20 20" aria-hidden="true"><path d="M2 5h16M2 10h16M2 15h16" stroke="currentColor" stroke-width="2" stroke-linecap="round"/></svg></button>
<a class="brand" href="${base}/"><span>${escape(project.title)}</span><span class="brief">Start</span></a>
<div class="search" role="search">
<input type="search" placeholder="Search" aria-label="Search the book" autocomplete="off" data-index="${base}/search.json" data-base="${base}">
<ul class="found" aria-label="Found" hidden></ul><p class="none" role="status"></p>
</div>
<button class="theme" type="button" aria-label="Dark or light"><svg width="20" height="20" viewBox="0 0 20 20" aria-hidden="true"><circle cx="10" cy="10" r="7.5" fill="none" stroke="currentColor" stroke-width="1.8"/><path d="M10 2.5a7.5 7.5 0 0 1 0 15z" fill="currentColor"/></svg></button>
</header>`;
}

export function document({ project, page, slug, base, assets }) {
  const context = { page, slug, base, assets };
  const body = render(page.mdast, context);
  const { title, subtitle, content_includes_title: titled } = page.frontmatter ?? {};
  const [, number] = /^([A0]\d) ·/.exec(title ?? "") ?? [];
  const heading = titled || !title ? "" : `<h1>${escape(title)}</h1>`;
  const file = page.location?.split("/").at(-1) ?? "";
  const [, tried] = /id="(try-\w+)"/.exec(body) ?? [];
  const trial = tried ? `<a class="try" href="#${tried}">Try it: the explorer</a>` : "";
  const notebook = file.endsWith(".ipynb") ? `<p class="notebook">${trial}<a href="${base}/notebooks/${file}" download>This page as a notebook</a></p>` : "";
  const under = subtitle ? `<p class="subtitle">${escape(subtitle)}</p>` : "";
  return `<!doctype html>
<html lang="en">
<head>
${head(page, project, base)}
</head>
<body${number ? ` data-chapter="${number}"` : ""}>
<a class="skip" href="#text">Skip to the text</a>
${bar(project, base)}
<div class="columns">
${chapters(project, slug, base)}
<main id="text" tabindex="-1">
<article>${heading}${under}${notebook}${body}${bibliography(page)}</article>
${neighbours(project, slug, base)}
</main>
${outline(page)}
</div>
${scripts(context, base)}
</body>
</html>`;
}
