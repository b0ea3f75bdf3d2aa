from benchmarks.suites import layers

SUITE = layers


def test_layers(benchmark, counter, contestant):
    contestant.time_and_meter(benchmark)
