from benchmarks.suites import losses

SUITE = losses


def test_losses(benchmark, contestant):
    contestant.time(benchmark)
