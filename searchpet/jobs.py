"""Jobs as users start them: the engine's, which leave a page in their run."""

from __future__ import annotations

from searchpet import engine
from searchpet.report import reported

search = reported(engine.search)
train = reported(engine.train)
