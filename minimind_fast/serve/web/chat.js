// The chat page. Purpose: talk to the model that this server has.
// Principle: the messages are the state; `draw` shows them, `answer` streams the next one. All text of the model and of
// the user becomes text nodes: nothing here ever reads it as HTML.
// Properties: no library, no build step; chats and settings stay in this browser (localStorage), the key in this tab only.
"use strict";

const $ = (id) => document.getElementById(id);
const SETTINGS = { system: "", temperature: "0.7", "max-tokens": "", thinking: false, tools: "" };
let chats = read("chats", []); // [{ title, messages }], newest first
let open = chats[0] || null;
let running = null; // AbortController of the answer that streams
let model = "";

function read(name, fallback) {
  try {
    return JSON.parse(localStorage.getItem("minimind." + name)) ?? fallback;
  } catch {
    return fallback;
  }
}

function save() {
  const keep = () => localStorage.setItem("minimind.chats", JSON.stringify(chats));
  try {
    keep();
  } catch { // the store is full: the older half of the chats goes
    chats = chats.slice(0, Math.max(1, chats.length >> 1));
    try { keep(); } catch { /* not kept, still shown */ }
  }
}

function el(tag, className = "", text = "") {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  return node;
}

// ---------------------------------------------------------------------------------------------------------- settings

function loadSettings() {
  const kept = { ...SETTINGS, ...read("settings", {}) };
  for (const id of Object.keys(SETTINGS)) {
    const box = $(id);
    if (box.type === "checkbox") box.checked = Boolean(kept[id]);
    else box.value = kept[id];
  }
  $("key").value = sessionStorage.getItem("minimind.key") || "";
  showTemperature();
}

function showTemperature() {
  $("temperature-shown").textContent = Number($("temperature").value).toFixed(2);
}

function keepSettings() {
  const kept = {};
  for (const id of Object.keys(SETTINGS)) kept[id] = $(id).type === "checkbox" ? $(id).checked : $(id).value;
  localStorage.setItem("minimind.settings", JSON.stringify(kept));
  sessionStorage.setItem("minimind.key", $("key").value);
  showTemperature();
}

function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: "Bearer " + key }) };
}

async function loadModel() {
  try {
    const reply = await fetch("v1/models", { headers: headers() });
    const body = await reply.json();
    if (!reply.ok) throw new Error(body.error.message);
    model = body.data[0].id;
    $("model").textContent = document.title = model;
  } catch (error) {
    $("model").textContent = error.message;
  }
}

// ----------------------------------------------------------------------------------------------------------- drawing

function drawChats() {
  $("chats").replaceChildren(...chats.map((chat) => {
    const row = el("div", chat === open ? "open" : "");
    const title = el("button", "title", chat.title);
    title.onclick = () => { stop(); open = chat; draw(); };
    const remove = el("button", "", "×");
    remove.title = "Delete this chat";
    remove.onclick = () => {
      if (chat === open) stop();
      chats = chats.filter((c) => c !== chat);
      if (chat === open) open = chats[0] || null;
      save();
      draw();
    };
    row.append(title, remove);
    return row;
  }));
}

function draw() {
  drawChats();
  $("log").replaceChildren(...(open ? open.messages.map(turn) : []));
  askForResults();
  $("log").scrollTop = $("log").scrollHeight;
}

// One message as an element; `fill` updates it while it streams.
function turn(message) {
  const node = el("div", "turn " + message.role);
  fill(node, message);
  return node;
}

function fill(node, message) {
  const unfolded = node.querySelector("details")?.open;
  const parts = [];
  if (message.reasoning_content) {
    const thought = el("details");
    thought.open = Boolean(unfolded);
    thought.append(el("summary", "", message.content || message.note || message.error ? "Thought" : "Thinking …"), el("p", "", message.reasoning_content));
    parts.push(thought);
  }
  if (message.role === "tool") parts.push(el("pre", "", "→ " + message.content));
  else if (message.content) parts.push(el("div", "body", message.content));
  for (const call of message.tool_calls || []) {
    parts.push(el("pre", "call", call.function.name + "(" + call.function.arguments + ")"));
  }
  if (message.note) parts.push(el("div", "note", message.note));
  if (message.error) parts.push(el("div", "error", message.error));
  node.replaceChildren(...parts);
}

// A call without its result: a field for it.
function askForResults() {
  if (!open || running) return;
  const given = new Set(open.messages.filter((m) => m.role === "tool").map((m) => m.tool_call_id));
  const calls = open.messages.flatMap((m) => m.tool_calls || []);
  const call = calls.find((c) => !given.has(c.id));
  if (!call) return;
  const form = el("form", "result");
  const field = el("input");
  field.placeholder = "Result of " + call.function.name;
  form.append(field, el("button", "", "Give"));
  form.onsubmit = (event) => {
    event.preventDefault();
    open.messages.push({ role: "tool", tool_call_id: call.id, content: field.value });
    save();
    draw();
    if (!document.querySelector(".result")) answer();
  };
  $("log").append(form);
}

// ---------------------------------------------------------------------------------------------------------- answering

function stop() {
  if (running) running.abort();
}

function request() {
  const body = { model, messages: [], stream: true, stream_options: { include_usage: true } };
  if ($("system").value.trim()) body.messages.push({ role: "system", content: $("system").value });
  for (const { note, error, ...message } of open.messages) {
    if (message.role !== "assistant" || message.content || message.tool_calls) body.messages.push(message);
  }
  body.temperature = Number($("temperature").value);
  if ($("max-tokens").value) body.max_tokens = Number($("max-tokens").value);
  body.chat_template_kwargs = { enable_thinking: $("thinking").checked };
  if ($("tools").value.trim()) {
    const tools = JSON.parse($("tools").value);
    body.tools = tools.map((t) => (t.type === "function" ? t : { type: "function", function: t }));
  }
  return body;
}

// The objects of a stream of server-sent events.
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (held + value).split("\n\n");
    held = blocks.pop();
    for (const block of blocks) {
      if (block === "data: [DONE]") return;
      if (block.startsWith("data: ")) yield JSON.parse(block.slice(6));
    }
  }
}

function take(message, delta) {
  if (delta.content) message.content += delta.content;
  if (delta.reasoning_content) message.reasoning_content = (message.reasoning_content || "") + delta.reasoning_content;
  for (const { index, ...call } of delta.tool_calls || []) (message.tool_calls ||= [])[index] = call;
}

async function answer() {
  const chat = open;
  const message = { role: "assistant", content: "" };
  const node = turn(message);
  const log = $("log");
  const begin = performance.now();
  running = new AbortController();
  busy(true);
  try {
    const body = request();
    log.append(node);
    chat.messages.push(message);
    const reply = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal,
    });
    if (!reply.ok) throw new Error((await reply.json()).error.message);
    let reason = "";
    for await (const chunk of events(reply)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const choice = chunk.choices[0];
      if (choice) {
        take(message, choice.delta);
        reason = choice.finish_reason || reason;
      }
      if (chunk.usage) {
        const seconds = (performance.now() - begin) / 1000;
        const tokens = chunk.usage.completion_tokens;
        message.note = `${tokens} tokens, ${(tokens / seconds).toFixed(1)} a second` + (reason === "length" ? ", cut at the limit" : "");
      }
      const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
      fill(node, message);
      if (atEnd) log.scrollTop = log.scrollHeight;
    }
  } catch (error) {
    if (error.name === "AbortError") message.note = "stopped";
    else message.error = error.message;
    if (!node.isConnected && chat === open) log.append(node);
    fill(node, message);
  } finally {
    running = null;
    busy(false);
    save();
    if (chat === open) draw();
  }
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
}

// -------------------------------------------------------------------------------------------------------------- start

$("ask").onsubmit = (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || running) return;
  if (!open) {
    open = { title: text.slice(0, 60), messages: [] };
    chats.unshift(open);
  }
  open.messages.push({ role: "user", content: text });
  $("text").value = "";
  draw();
  answer();
};
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
};
$("stop").onclick = stop;
$("new").onclick = () => { stop(); open = null; draw(); $("text").focus(); };
$("settings").oninput = keepSettings;
$("settings").onsubmit = (event) => event.preventDefault();
$("key").onchange = loadModel;
loadSettings();
loadModel();
draw();
