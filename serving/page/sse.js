// Server-sent events over fetch: EventSource can neither send a form nor see comments, in which the service
// tells the expressive instruction and the steps.

/**
 * Reads a body of events; lines end in LF or CRLF.
 * Yields {comment} for each comment and {event, data} for each event; one that is cut off is left out.
 */
export async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let event = "message";
  let data = [];
  let begun = []; // pieces of a line whose end has not come: a picture is one line of many pieces
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const pieces = value.split("\n");
      for (const [i, piece] of pieces.entries()) {
        begun.push(piece);
        if (i === pieces.length - 1) break;
        const line = begun.join("").replace(/\r$/, "");
        begun = [];
        if (line === "") {
          if (data.length) yield { event, data: data.join("\n") };
          event = "message";
          data = [];
        } else if (line.startsWith(":")) {
          yield { comment: line.slice(1).trimStart() };
        } else {
          const [, name, text] = /^([^:]*):? ?(.*)$/.exec(line);
          if (name === "event") event = text;
          else if (name === "data") data.push(text);
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it has failed already, or nobody waits for more
  }
}
