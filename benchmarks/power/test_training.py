from benchmarks.suites import training

SUITE = training


def test_training(benchmark, counter, contestant):
    contestant.time_and_meter(benchmark)
