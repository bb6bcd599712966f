"""Jobs as users start them: the engine's, which leave a page in their run."""

from __future__ import annotations

from searchpet import engine
from searchpet.report import reported
from searchpet.transfer import transfer as carry

search = reported(engine.search)
train = reported(engine.train)
transfer = reported(carry)
