use super::*;

fn up() -> Machine {
    let mut machine = Machine::default();
    assert_eq!(machine.step(Event::Disk(Status::True), 0), Some(Action::Launch));
    machine.step(Event::Launched(Ok(())), 0);
    assert_eq!(machine.step(Event::Tick, 0), Some(Action::Probe));
    assert_eq!(
        machine.step(Event::Probed(Probe::Ready("SELECT 1".into())), 0),
        Some(Action::Adjust)
    );
    assert_eq!(machine.step(Event::Adjusted(Adjusted::Done), 0), None);
    machine
}

#[test]
fn nothing_starts_without_the_data_disk() {
    let mut machine = Machine::default();
    assert_eq!(machine.step(Event::Tick, 0), None);
    assert_eq!(machine.step(Event::Disk(Status::Unknown), 0), None);
    assert_eq!(machine.verdict().status, Status::Unknown);
    assert_eq!(machine.step(Event::Disk(Status::False), 0), None);
    assert_eq!(machine.verdict().reason, "DiskMissing");
}

#[test]
fn ready_needs_an_answer_and_recovery_is_not_an_end() {
    let mut machine = Machine::default();
    machine.step(Event::Disk(Status::True), 0);
    machine.step(Event::Launched(Ok(())), 0);
    for (probe, reason) in [
        (Probe::Refused("no socket".into()), "Starting"),
        (Probe::Recovering("57P03".into()), "Recovering"),
        (Probe::Broken("x".into()), "Broken"),
    ] {
        assert_eq!(machine.step(Event::Probed(probe), 0), None);
        assert_eq!(
            (machine.verdict().status, machine.verdict().reason.as_str()),
            (Status::False, reason)
        );
        assert_eq!(machine.state(), &State::Starting);
    }
}

#[test]
fn silence_is_unknown_twice_and_then_false() {
    let mut machine = up();
    let mut seen = Vec::new();
    for n in 0..4 {
        machine.step(Event::Probed(Probe::Silent("2 s".into())), n);
        seen.push(machine.verdict().status);
    }
    assert_eq!(
        seen,
        [Status::Unknown, Status::Unknown, Status::False, Status::False]
    );
    machine.step(Event::Probed(Probe::Ready(String::new())), 5);
    assert_eq!(machine.verdict().status, Status::True);
}

#[test]
fn ends_are_answered_with_longer_pauses_and_then_a_crash_loop() {
    let mut machine = up();
    let mut now = 0;
    let mut pauses = Vec::new();
    loop {
        machine.step(Event::Ended("killed by signal 9".into()), now);
        let State::Pausing { until_ms } = *machine.state() else {
            break;
        };
        pauses.push(until_ms - now);
        assert_eq!(machine.step(Event::Tick, until_ms - 1), None);
        assert_eq!(machine.step(Event::Tick, until_ms), Some(Action::Launch));
        machine.step(Event::Launched(Ok(())), until_ms);
        now = until_ms;
    }
    assert_eq!(pauses, [200, 400, 800, 1_600]);
    assert_eq!(
        (machine.state(), machine.verdict().reason.as_str()),
        (&State::Stuck, "CrashLoop")
    );
    assert_eq!(machine.step(Event::Tick, now + 1_000_000), None);
    assert_eq!(machine.step(Event::Changed, now), Some(Action::Launch));
}

#[test]
fn rare_ends_are_no_crash_loop() {
    let mut machine = up();
    for n in 0..20 {
        let now = n * 20_000;
        machine.step(Event::Ended("x".into()), now);
        assert_eq!(
            machine.step(Event::Tick, now + 19_000),
            Some(Action::Launch),
            "{n}"
        );
        machine.step(Event::Launched(Ok(())), now + 19_000);
    }
}

#[test]
fn a_hopeless_launch_is_not_tried_again() {
    let mut machine = Machine::default();
    machine.step(Event::Disk(Status::True), 0);
    machine.step(
        Event::Launched(Err(LaunchError::Hopeless("OtherVersion", "16, not 17".into()))),
        0,
    );
    assert_eq!(machine.verdict(), &Verdict::no("OtherVersion", "16, not 17"));
    assert_eq!(machine.step(Event::Tick, 1_000_000), None);
}

#[test]
fn a_change_is_adjusted_once_also_when_it_comes_during_an_adjustment() {
    let mut machine = up();
    assert_eq!(machine.step(Event::Changed, 1), Some(Action::Adjust));
    assert_eq!(machine.step(Event::Changed, 1), None);
    assert_eq!(
        machine.step(Event::Adjusted(Adjusted::Done), 2),
        Some(Action::Adjust)
    );
    assert_eq!(machine.step(Event::Adjusted(Adjusted::Done), 3), None);
}

#[test]
fn a_failed_adjustment_is_told_and_tried_again() {
    let mut machine = up();
    machine.step(Event::Changed, 1);
    machine.step(Event::Adjusted(Adjusted::Failed("bad value".into())), 1);
    assert_eq!(machine.unadjusted(), Some("bad value"));
    assert_eq!(machine.verdict().status, Status::True);
    machine.step(Event::Tick, 6_000); // a probe
    assert_eq!(machine.step(Event::Tick, 60_000), None);
    assert_eq!(machine.step(Event::Tick, 60_001), Some(Action::Adjust));
    machine.step(Event::Adjusted(Adjusted::Done), 60_002);
    assert_eq!(machine.unadjusted(), None);
}

#[test]
fn a_restart_launches_again_and_a_stop_does_not() {
    let mut machine = up();
    machine.step(Event::Changed, 1);
    assert_eq!(
        machine.step(Event::Adjusted(Adjusted::Restart("port".into())), 1),
        Some(Action::Stop)
    );
    assert_eq!(machine.step(Event::Ended("0".into()), 2), Some(Action::Launch));

    let mut machine = up();
    assert_eq!(machine.step(Event::Stop, 1), Some(Action::Stop));
    assert_eq!(machine.step(Event::Tick, 30_000), None);
    assert_eq!(machine.step(Event::Tick, 30_001), Some(Action::Kill));
    assert_eq!(machine.step(Event::Tick, 30_002), None);
    assert_eq!(machine.step(Event::Ended("137".into()), 30_003), None);
    assert_eq!(machine.state(), &State::Stopped);
}

#[test]
fn a_stop_during_a_launch_waits_for_it() {
    let mut machine = Machine::default();
    machine.step(Event::Disk(Status::True), 0);
    assert_eq!(machine.step(Event::Stop, 0), None);
    assert_eq!(machine.step(Event::Launched(Ok(())), 1), Some(Action::Stop));
    machine.step(Event::Ended("0".into()), 2);
    assert_eq!(machine.state(), &State::Stopped);
}

#[test]
fn an_end_that_nobody_saw_is_told_and_the_launch_goes_on() {
    let mut machine = Machine::default();
    machine.step(Event::Disk(Status::True), 0);
    assert_eq!(machine.step(Event::Missed("signal 9".into()), 1), None);
    assert_eq!(
        machine.verdict(),
        &Verdict::no("Ended", "signal 9, while no agent was there; started again")
    );
    assert_eq!(machine.state(), &State::Launching);
    machine.step(Event::Launched(Ok(())), 2);
    assert_eq!(machine.state(), &State::Starting);
    // It is one of those that make a crash loop.
    for n in 3..6 {
        machine.step(Event::Ended("signal 9".into()), n * 5_000);
        assert_eq!(machine.step(Event::Tick, n * 5_000 + 4_000), Some(Action::Launch));
        machine.step(Event::Launched(Ok(())), n * 5_000 + 4_000);
    }
    machine.step(Event::Ended("signal 9".into()), 30_000);
    assert_eq!(machine.verdict().reason, "CrashLoop");
}

#[test]
fn each_state_says_whether_it_rests_has_begun_and_has_reached_its_specification() {
    let waiting = Machine::default();
    let mut launching = Machine::default();
    launching.step(Event::Disk(Status::True), 0);
    assert_eq!(launching.verdict().reason, "Launching");
    let mut starting = Machine::default();
    starting.step(Event::Disk(Status::True), 0);
    starting.step(Event::Launched(Ok(())), 0);
    let mut silent = up();
    silent.step(Event::Probed(Probe::Silent("2 s".into())), 1);
    let mut pausing = up();
    pausing.step(Event::Ended("1".into()), 1);
    let mut stopping = up();
    stopping.step(Event::Stop, 1);
    let mut stopped = up();
    stopped.step(Event::Stop, 1);
    stopped.step(Event::Ended("0".into()), 2);
    for (machine, rests, begun, progress) in [
        (waiting, true, false, Progress::Pending),
        (launching, false, true, Progress::Pending),
        (starting, false, true, Progress::Pending),
        (up(), true, true, Progress::Reached),
        (silent, false, true, Progress::Pending),
        (stopping, false, true, Progress::Pending),
        (stopped, true, false, Progress::Reached),
    ] {
        let state = machine.state().clone();
        assert_eq!(
            (machine.at_rest(), machine.has_begun()),
            (rests, begun),
            "{state:?}"
        );
        assert_eq!(machine.progress(), progress, "{state:?}");
    }
    assert_eq!((pausing.at_rest(), pausing.has_begun()), (false, false));
    assert!(matches!(pausing.progress(), Progress::Failed(_)));
}

#[test]
fn a_relaunch_still_says_how_it_ended() {
    let mut machine = up();
    machine.step(Event::Ended("killed by signal 9".into()), 0);
    let told = machine.verdict().clone();
    assert_eq!(machine.step(Event::Tick, 10_000), Some(Action::Launch));
    assert_eq!(machine.verdict(), &told);
    let mut running = up();
    running.step(Event::Missed("signal 9".into()), 1);
    assert_eq!(
        running.verdict().reason,
        "Ready",
        "it runs: the end was another's"
    );
}

#[test]
fn failures_count_for_the_whole_window() {
    let stuck = |later: u64| {
        let mut machine = up();
        for at in [
            0,
            CRASH_WINDOW_MS - 3,
            CRASH_WINDOW_MS - 2,
            CRASH_WINDOW_MS - 1,
            CRASH_WINDOW_MS + later,
        ] {
            machine.pause("Ended", "x", at);
        }
        machine.state() == &State::Stuck
    };
    assert!(stuck(0) && !stuck(1));
}

#[test]
fn what_answered_once_and_refuses_now_is_another_thing_than_a_start() {
    let mut machine = up();
    machine.step(Event::Probed(Probe::Ready("1".into())), 7);
    assert_eq!(machine.next_probe_ms, 7 + PROBE_STEADY_MS);
    machine.step(Event::Probed(Probe::Refused("no socket".into())), 11);
    assert_eq!(machine.verdict().reason, "NotListening");
    assert_eq!(machine.next_probe_ms, 11 + PROBE_FAST_MS);
}

#[test]
fn only_a_stop_that_was_asked_for_is_told_as_one() {
    let mut restarting = up();
    restarting.step(Event::Changed, 1);
    restarting.step(Event::Adjusted(Adjusted::Restart("port".into())), 1);
    assert_ne!(restarting.verdict().evidence, "it was told to stop");
    let mut stopping = up();
    stopping.step(Event::Stop, 1);
    assert_eq!(
        stopping.verdict(),
        &Verdict::no("Stopping", "it was told to stop")
    );
}
