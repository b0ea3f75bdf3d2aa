from benchmarks.suites import students

SUITE = students


def test_students(benchmark, counter, contestant):
    contestant.time_and_meter(benchmark)
