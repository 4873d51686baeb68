"""TensorBoard event files of a run: curves, events as text, configuration as text and
hyperparameters.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from geodiag.errors import GeodiagError
from geodiag.export.curves import curves, metric_of
from geodiag.export.selection import Choice
from geodiag.export.texts import configuration, event_text, hyperparameters, trail
from geodiag.export.wall_times import WallTimes
from geodiag.run import Run


class EventFiles:
    """Writes tables piece by piece; see `run_export.Files`. One event file an attempt and rank.

    TensorBoard's record writer is used without its queue and thread, so that an error of the disk
    is raised at once.
    """

    def __init__(self, folder: Path, choice: Choice, run: Run, times: WallTimes) -> None:
        self._pb = _protos()
        self._folder, self._choice, self._run, self._times = folder, choice, run, times
        self._open: dict[str, Any] = {}
        self._tags: dict[str, set[str]] = {}
        self._trail: dict[str, list[dict[str, Any]]] = {}
        self.values = 0
        self.rows_by_file: dict[str, int] = {}

    @property
    def tags(self) -> int:
        return len(set().union(*self._tags.values()))

    def write(self, table: str, rows: pa.Table) -> None:
        if table == "events":
            self._keep_events(rows)
            return
        times = self._times.of(rows["attempt"].to_numpy(), rows["step"].to_numpy())
        for moment in curves(table, rows, self._choice.places == "summary"):
            if moment.points:
                sub = self._sub(moment.attempt, moment.rank)
                self._write_points(sub, moment.step, float(times[moment.row]), moment.points)

    def finish(self) -> None:
        for sub, events in self._trail.items():
            # When a step comes again, TensorBoard drops a tag's later steps: so the events are
            # written in order, one text a step.
            for (kind, step), rows in sorted(_together(events).items()):
                text = "\n\n---\n\n".join(event_text(row) for row in rows)
                self._text(sub, f"events/{kind}", text, step, rows[-1]["time"])
            last = max(events, key=lambda row: row["step"])
            self._text(sub, "events", trail(events), last["step"], last["time"])
        self.abandon()

    def abandon(self) -> None:
        for writer in self._open.values():
            writer.close()

    def _sub(self, attempt: int, rank: int) -> str:
        """Return the subfolder, which TensorBoard shows as a run of its own."""
        parts = [f"attempt-{attempt}"] if self._choice.attempt == "all" else []
        return "/".join([*parts, *([f"rank-{rank}"] if self._choice.ranks == "each" else [])])

    def _write_points(
        self, sub: str, step: int, time: float, points: list[tuple[str, float]]
    ) -> None:
        event = self._pb.Event(step=step, wall_time=time)
        writer, known = self._writer(sub, time), self._tags[sub]
        for tag, value in points:
            entry = event.summary.value.add(tag=tag, simple_value=value)
            if tag not in known:
                known.add(tag)
                metric = metric_of(tag)
                entry.metadata.plugin_data.plugin_name = "scalars"
                entry.metadata.data_class = self._pb.SCALAR
                entry.metadata.summary_description = f"{metric.help} Unit: {metric.unit}"
        writer.write(event.SerializeToString())
        self.values += len(points)

    def _keep_events(self, rows: pa.Table) -> None:
        times = self._times.of(rows["attempt"].to_numpy(), rows["step"].to_numpy())
        for row, usual in zip(rows.to_pylist(), times.tolist(), strict=True):
            row["time"] = usual if row["time"] is None else row["time"]
            self._trail.setdefault(self._sub(row["attempt"], row["rank"]), []).append(row)
        self.values += len(rows)

    def _text(self, sub: str, tag: str, text: str, step: int, time: float) -> None:
        self._summary(sub, self._pb.text(tag, text), step, time)
        self._tags[sub].add(tag)

    def _summary(self, sub: str, summary: Any, step: int, time: float) -> None:
        event = self._pb.Event(step=step, wall_time=time, summary=summary)
        self._writer(sub, time).write(event.SerializeToString())

    def _writer(self, sub: str, time: float) -> Any:
        if sub not in self._open:
            folder = self._folder / sub
            folder.mkdir(parents=True, exist_ok=True)
            # TensorBoard recognises an event file by this first record.
            file = (folder / f"events.out.tfevents.{int(time):010d}.geodiag").open(
                "wb", buffering=1 << 20
            )
            self._open[sub] = self._pb.RecordWriter(file)
            self._tags[sub] = {"configuration"}
            begin = self._pb.Event(wall_time=time, file_version="brain.Event:2")
            self._open[sub].write(begin.SerializeToString())
            config = self._run.manifest
            self._summary(sub, self._pb.text("configuration", configuration(config)), 0, time)
            self._summary(sub, self._pb.hparams(hyperparameters(config), time), 0, time)
        return self._open[sub]


def _together(events: list[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Return the events of one kind and step, in their order."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in sorted(events, key=lambda row: row["time"]):
        found.setdefault((row["kind"], row["step"]), []).append(row)
    return found


class _Protos:
    """The parts of tensorboard that are used; none of them loads torch or TensorFlow."""

    def __init__(self) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, Summary
        from tensorboard.plugins.hparams import metadata as of_hparams
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
        from tensorboard.plugins.text import metadata as of_texts
        from tensorboard.summary.writer.record_writer import RecordWriter
        from tensorboard.util.tensor_util import make_tensor_proto

        self.Event, self.RecordWriter, self._Summary = Event, RecordWriter, Summary
        self.SCALAR = DATA_CLASS_SCALAR
        self._of_hparams, self._Data = of_hparams, HParamsPluginData
        self._of_texts, self._tensor = of_texts, make_tensor_proto

    def text(self, tag: str, text: str) -> Any:
        about = self._of_texts.create_summary_metadata(display_name=None, description=None)
        tensor = self._tensor(text, dtype=np.object_)
        return self._Summary(value=[self._Summary.Value(tag=tag, metadata=about, tensor=tensor)])

    def hparams(self, known: dict[str, bool | float | str], time: float) -> Any:
        data = self._Data()
        data.session_start_info.start_time_secs = time
        for name, value in known.items():
            kind = (
                "bool"
                if isinstance(value, bool)
                else "string"
                if isinstance(value, str)
                else "number"
            )
            setattr(data.session_start_info.hparams[name], f"{kind}_value", value)
        about = self._of_hparams.create_summary_metadata(data)
        tag, empty = self._of_hparams.SESSION_START_INFO_TAG, self._of_hparams.NULL_TENSOR
        return self._Summary(value=[self._Summary.Value(tag=tag, metadata=about, tensor=empty)])


def _protos() -> _Protos:
    try:
        return _Protos()
    except ImportError as e:
        raise GeodiagError(
            f"--to tensorboard needs a package that is not here ({e}); "
            "pip install tensorboard, or pass --to csv"
        ) from None
