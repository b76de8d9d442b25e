"""Both halves of the app. The server waits for all answers of a round, looking every half second, as a run does."""

import json
import time
from pathlib import Path

from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

client = ClientApp()
server = ServerApp()


@client.query()
def answer(message: Message, context: Context) -> Message:
    return Message(message.content, reply_to=message)


@server.main()
def rounds(grid: Grid, context: Context) -> None:
    config = context.run_config
    while len(nodes := list(grid.get_node_ids())) < config["nodes"]:
        time.sleep(0.5)
    content = bytes(config["size"])
    ends = []
    for _ in range(config["rounds"]):
        waiting = set()
        for _ in range(config["messages"]):
            for node in nodes:
                array = Array("uint8", (len(content),), "bytes", content)
                record = RecordDict({"all": ArrayRecord({"x": array})})
                waiting |= set(grid.push_messages([Message(record, dst_node_id=node, message_type="query", ttl=600)]))
        while waiting:
            time.sleep(0.5)
            waiting -= {message.metadata.reply_to_message_id for message in grid.pull_messages(list(waiting))}
        ends.append(time.time())
    Path(config["file"]).write_text(json.dumps(ends))
