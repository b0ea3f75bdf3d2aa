from benchmarks.suites import losses

SUITE = losses


def test_losses(benchmark, counter, contestant):
    contestant.time_and_meter(benchmark)
