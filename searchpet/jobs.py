"""Jobs as users start them: the engine's, which leave a page in their run."""

from __future__ import annotations

from searchpet import engine
from searchpet.report import reported
from searchpet.transfer import transfer as carry
from searchpet.tune import collect as fetch
from searchpet.tune import tune as study

search = reported(engine.search)
train = reported(engine.train)
transfer = reported(carry)
tune = reported(study)
collect = reported(fetch)
