from benchmarks.suites import training

SUITE = training


def test_training(benchmark, contestant):
    contestant.time(benchmark)
