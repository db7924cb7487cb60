"use strict";
// Whatever comes from the server is put in as text (textContent), never as markup.
const PERIOD = 1000; // ms between two looks
const byId = (id) => document.getElementById(id);
let key = ""; // only in this page's memory
let watched = null; // the client whose pictures are shown
let pictures = []; // object URLs of them

const number = (value, digits = 0) => (value === null || value === undefined ? "–" : Number(value).toFixed(digits));
const ms = (value) => (value === null || value === undefined ? "–" : `${number(value, value < 10 ? 1 : 0)} ms`);
const text = (id, words) => { byId(id).textContent = words; };
const show = (id, shown) => { byId(id).hidden = !shown; };

function span(seconds) {
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return `${Math.round(seconds / 3600)} h`;
}

function ask(path) {
  return fetch(path, { headers: key ? { Authorization: `Api-Key ${key}` } : {}, cache: "no-store" });
}

function rows(table, lines) {
  const body = byId(table).tBodies[0];
  body.replaceChildren(...lines.map((cells) => {
    const row = document.createElement("tr");
    row.append(...cells.map((cell) => {
      const place = document.createElement("td");
      place.append(cell instanceof Node ? cell : document.createTextNode(String(cell)));
      return place;
    }));
    return row;
  }));
}

function curve(values, top, name) {
  let pen = "M", line = "";
  values.forEach((value, at) => {
    if (value === null) { pen = "M"; return; }
    const x = (600 * at) / Math.max(1, values.length - 1), y = 114 - (108 * Math.min(value, top)) / top;
    line += pen === "M" ? `M${x.toFixed(1)} ${y.toFixed(1)}h0.1` : `L${x.toFixed(1)} ${y.toFixed(1)}`;
    pen = "L";
  });
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", line || "M0 0");
  path.setAttribute("class", name);
  return path;
}

function drawLatency(history) {
  const most = Math.max(1, ...history.max.filter((value) => value !== null));
  const step = 10 ** Math.floor(Math.log10(most));
  const top = Math.ceil(most / step) * step;
  byId("spark").replaceChildren(curve(history.max, top, "max"), curve(history.p50, top, "p50"));
  text("top", number(top));
}

function drawClients(found) {
  show("hidden", !found.details.shown);
  show("login", !found.details.shown && found.details.needs_key);
  show("clients", found.details.shown && found.clients.length > 0);
  show("hint", found.details.shown && found.clients.length > 0 && watched === null);
  if (!found.details.shown) {
    text("hidden", found.details.needs_key ? "Who is connected is shown with the key." : `Clients: ${found.details.why}.`);
    watch(null);
    return;
  }
  if (watched !== null && !found.clients.some((client) => client.address === watched)) watch(null);
  if (found.clients.length === 0) { show("hidden", true); text("hidden", "Nobody is connected."); }
  rows("clients", found.clients.map((client) => {
    const button = document.createElement("button");
    button.textContent = client.address;
    button.setAttribute("aria-pressed", String(watched === client.address));
    button.addEventListener("click", () => watch(watched === client.address ? null : client.address, found.cameras));
    return [button, span(client.connected_s), client.answered, client.refused, ms(client.last_ms)];
  }));
}

async function watch(client, cameras = []) {
  const changed = client !== watched;
  watched = client;
  if (client === null) {
    if (changed) { pictures.forEach(URL.revokeObjectURL); pictures = []; byId("pictures").replaceChildren(); }
    return;
  }
  const made = [], figures = [];
  for (const camera of cameras) {
    const reply = await ask(`picture?client=${encodeURIComponent(client)}&camera=${encodeURIComponent(camera)}`);
    const figure = document.createElement("figure"), caption = document.createElement("figcaption");
    caption.textContent = `${camera} of ${client}`;
    if (reply.ok) {
      const image = document.createElement("img");
      image.alt = caption.textContent;
      made.push(URL.createObjectURL(await reply.blob()));
      image.src = made[made.length - 1];
      figure.append(image);
    } else {
      caption.textContent += ": no picture";
    }
    figure.append(caption);
    figures.push(figure);
  }
  if (watched !== client) { made.forEach(URL.revokeObjectURL); return; }
  byId("pictures").replaceChildren(...figures);
  pictures.forEach(URL.revokeObjectURL);
  pictures = made;
}

function draw(found) {
  const badge = byId("health");
  badge.className = found.accepting ? "badge good" : "badge bad";
  badge.textContent = found.accepting ? `serving for ${span(found.uptime_s)}` : "takes no requests";
  text("p50", ms(found.latency.p50));
  text("p99", ms(found.latency.p99));
  text("rate", number(found.per_second, 1));
  text("connected", found.connected);
  text("queue", `${found.queue.waiting}, ${found.queue.running}`);
  text("wait", ms(found.wait.p99));
  text("batch", number(found.batch, 1));
  text("dropped", found.counts["requests.dropped"] || 0);
  drawLatency(found.history);
  drawClients(found);
  const counts = Object.entries(found.counts).sort(([a], [b]) => a.localeCompare(b));
  rows("counts", counts.map(([name, count]) => [name.replace(".", ", ").replaceAll("_", " "), count]));
  show("error", found.last_error !== null);
  if (found.last_error !== null) text("error", `Last error, ${span(found.last_error.ago)} ago: ${found.last_error.line}`);
  rows("policy", Object.entries(found.policy));
  show("recording", Boolean(found.recording));
  if (found.recording) text("record", found.recording);
}

async function look() {
  if (document.hidden) return;
  try {
    const reply = await ask("status.json");
    if (!reply.ok) throw new Error(`status ${reply.status}`);
    const found = await reply.json();
    draw(found);
    if (watched !== null) await watch(watched, found.cameras);
  } catch (problem) {
    byId("health").className = "badge bad";
    text("health", "does not answer");
  }
}

byId("login").addEventListener("submit", (event) => {
  event.preventDefault();
  key = byId("key").value;
  look();
});

async function forever() {
  await look();
  setTimeout(forever, PERIOD);
}
forever();
