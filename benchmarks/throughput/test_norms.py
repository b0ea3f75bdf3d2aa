from benchmarks.suites import norms

SUITE = norms


def test_norms(benchmark, contestant):
    contestant.time(benchmark)
