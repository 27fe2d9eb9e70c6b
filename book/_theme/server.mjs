// The theme's server. MyST runs it while it writes the static site, and asks it for every page; all
// that it knows of the book it reads from MyST's content server.
import fs from "node:fs";
import http from "node:http";
import path from "node:path";
import { sized } from "./images.mjs";
import { document } from "./page.mjs";

const { PORT, HOST = "localhost", CONTENT_CDN_PORT, BASE_URL = "", MODE } = process.env;
const CONTENT = `http://${HOST}:${CONTENT_CDN_PORT}`;
const HERE = import.meta.dirname ?? path.dirname(new URL(import.meta.url).pathname);
const PUBLIC = path.join(HERE, "public");
// MyST writes this prefix, in a static build, into the address of the folder of built files.
const assets = MODE === "static" ? "/myst_assets_folder" : CONTENT;
const TYPES = {
  ".css": "text/css",
  ".html": "text/html; charset=utf-8",
  ".js": "text/javascript",
  ".mjs": "text/javascript",
  ".json": "application/json",
  ".svg": "image/svg+xml",
  ".txt": "text/plain",
  ".woff2": "font/woff2",
  ".xml": "application/xml",
};

async function content(address) {
  const answer = await fetch(CONTENT + address);
  if (!answer.ok) throw Object.assign(new Error(`${address}: ${answer.status}`), answer);
  return answer.json();
}

// The bytes of a built file, which a page names by its address; of images elsewhere, none.
async function built(address) {
  if (!address.startsWith(`${assets}/`)) return Buffer.alloc(0);
  const answer = await fetch(CONTENT + address.slice(assets.length));
  return Buffer.from(await answer.arrayBuffer());
}

// A page gets back the long outputs of its cells, which MyST moves to files of their own.
async function restore(node) {
  const html = node.jupyter_data?.data?.["text/html"];
  if (html?.path) html.content = String(await built(assets + html.path));
  await Promise.all((node.children ?? []).map(restore));
}

async function page(slug) {
  const { projects: [project] } = await content("/config.json");
  const found = await content(`/content/${(slug || project.index).replaceAll("/", ".")}.json`);
  await restore(found.mdast);
  const at = slug === project.index ? "" : slug;
  return sized(document({ project, page: found, slug: at, base: BASE_URL, assets }), built);
}

async function sitemap() {
  const { projects: [project] } = await content("/config.json");
  const slugs = ["", ...project.pages.map((each) => each.slug).filter((slug) => slug)];
  const rows = slugs.map((slug) => `<url><loc>${BASE_URL}/${slug}</loc></url>`);
  return `<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">${rows.join("")}</urlset>`;
}

function file(name) {
  const found = path.join(PUBLIC, path.normalize(`/${name}`));
  if (!fs.existsSync(found)) throw Object.assign(new Error(`${name}: 404`), { status: 404 });
  return [path.extname(found), fs.readFileSync(found)];
}

async function answer(address) {
  if (address === "/myst-theme.css") return [".css", fs.readFileSync(path.join(HERE, "style.css"))];
  if (address === "/favicon.ico") return file("favicon.svg");
  if (address === "/robots.txt") return [".txt", "User-agent: *\nAllow: /\n"];
  if (address === "/sitemap.xml") return [".xml", await sitemap()];
  if (address === "/sitemap_style.xsl") {
    return [".xml", '<xsl:stylesheet version="1.0" xmlns:xsl="http://www.w3.org/1999/XSL/Transform"/>'];
  }
  if (address.endsWith(".json") && !fs.existsSync(path.join(PUBLIC, address))) {
    return [".json", JSON.stringify(await content(`/content${address}`))];
  }
  if (path.extname(address)) return file(address);
  return [".html", await page(address.replace(/^\/|\/$/g, ""))];
}

http
  .createServer(async (request, response) => {
    const { pathname } = new URL(request.url, "http://localhost");
    try {
      const [kind, body] = await answer(decodeURIComponent(pathname));
      response.setHeader("content-type", TYPES[kind] ?? "application/octet-stream");
      response.end(body);
    } catch (error) {
      response.statusCode = error.status === 404 ? 404 : 500;
      if (response.statusCode === 500) console.error(error.stack);
      response.end(String(error));
    }
  })
  .listen(PORT, HOST, () => console.log(`listening on http://${HOST}:${PORT}`));
