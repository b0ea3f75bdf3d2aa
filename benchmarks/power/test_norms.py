from benchmarks.suites import norms

SUITE = norms


def test_norms(benchmark, counter, contestant):
    contestant.time_and_meter(benchmark)
