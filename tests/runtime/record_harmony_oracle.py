"""Records what openai-harmony makes of replies, for `test_harmony.py`. The package downloads its vocabulary, so no test runs it.

    python3 -m venv /tmp/oracle && /tmp/oracle/bin/pip install openai-harmony==0.0.8
    TIKTOKEN_ENCODINGS_BASE=FOLDER-WITH-o200k_base.tiktoken /tmp/oracle/bin/python record_harmony_oracle.py > harmony_oracle.json

Each line: the reply after `<|start|>assistant`, as text with its markers; the messages that are complete in it, each as channel,
recipient, content type and content; and the one that is still coming, or null.
"""

import json
import random

from openai_harmony import HarmonyEncodingName, Role, StreamableParser, load_harmony_encoding

SAID = [
    "Hello.",
    "Let me see: 2 + 2 = 4.",
    "Grüße, 世界! 👩‍👩‍👧",
    "",
    "\n\n# A *title*\n",
    " indented",
    "ends with a space ",
    "a < b |> c",
]
ARGUMENTS = ['{"place": "Ulm"}', "{}", "print('é')\n", '{"text": "<start> <|not a marker|>"}']
TOOLS = ["functions.get_weather", "browser.search", "python", "functions.f"]


def message(choose: random.Random) -> str:
    """A header and its content as the model was taught to write them."""
    if choose.random() < 0.6:
        return f"<|channel|>{choose.choice(['analysis', 'commentary', 'final'])}<|message|>{choose.choice(SAID)}"
    to, kind = f" to={choose.choice(TOOLS)}", choose.choice(["", " json", " code", " <|constrain|>json", "<|constrain|>json"])
    channel = choose.choice(["analysis", "commentary"])
    header = f"{to}<|channel|>{channel}{kind}" if choose.random() < 0.5 else f"<|channel|>{channel}{to}{kind}"
    return f"{header}<|message|>{choose.choice(ARGUMENTS)}"


def main() -> None:
    """Print the records as a JSON list with a record a line."""
    encoding = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
    choose, records = random.Random(20), {}
    while len(records) < 240:
        messages = [message(choose) for _ in range(choose.randint(1, 4))]
        reply = "<|end|><|start|>assistant".join(messages) + choose.choice(["<|end|>", "<|return|>", "<|call|>"])
        tokens = encoding.encode(reply, allowed_special="all")
        if choose.random() < 0.5:
            tokens = tokens[: choose.randint(1, len(tokens))]
        try:
            reply = encoding.decode_utf8(tokens)
        except Exception:  # cut inside a character: the other tokenizer cannot say the same
            continue
        parser = StreamableParser(encoding, role=Role.ASSISTANT)
        for token in tokens:
            parser.process(token)
        done = [[m.channel, m.recipient, m.content_type, m.content[0].text] for m in parser.messages]
        coming = None
        if parser.state_data["state"] == "Content":
            coming = [parser.current_channel, parser.current_recipient, parser.current_content_type, parser.current_content]
        records[reply] = [reply, done, coming]
    print("[\n" + ",\n".join(json.dumps(record, ensure_ascii=False) for record in records.values()) + "\n]")


if __name__ == "__main__":
    main()
