//! Floor 3: commands that meet each other, and commands that are interrupted.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use sovereign_tests::Instance;
use sovereign_tests::instance::{kill, signal};
use sovereign_tests::seat::copy_program;

const AGAIN: Duration = Duration::from_secs(90);
/// An interrupted command ends within this time.
const SOON: Duration = Duration::from_secs(20);

fn start(instance: &Instance, arguments: &[&str]) -> Result<Child> {
    let mut command = instance.command(arguments);
    Ok(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn commands_that_meet_and_commands_that_are_cut_leave_something_whole() -> Result<()> {
    Instance::new()?.go_through(meet)
}

fn meet(instance: &Instance) -> Result<()> {
    two_ups_at_once_make_one_guest(instance)?;
    a_second_host_agent_is_refused(instance)?;
    a_replaced_program_replaces_the_agent_and_adopts_the_guest(instance)?;
    instance.ok(&["down"])?;
    an_interrupted_up_ends_at_once_whenever_it_comes(instance)?;
    down_during_up_wins_and_up_says_so(instance)?;
    an_unknown_disk_is_never_formatted(instance)
}

fn two_ups_at_once_make_one_guest(instance: &Instance) -> Result<()> {
    let (one, two) = (start(instance, &["up"])?, start(instance, &["up"])?);
    let (one, two) = (one.wait_with_output()?, two.wait_with_output()?);
    ensure!(one.status.success(), "{}", text(&one));
    ensure!(two.status.success(), "{}", text(&two));
    instance.process(&["sovereign-host run"])?;
    instance.process(&["qemu-system"])?;
    Ok(())
}

fn a_second_host_agent_is_refused(instance: &Instance) -> Result<()> {
    let before = instance.guest()?;
    let first = instance.process(&["sovereign-host run"])?;
    let words = std::fs::read(format!("/proc/{first}/cmdline"))?;
    let words: Vec<&str> = std::str::from_utf8(&words)?
        .split_terminator('\0')
        .filter(|w| *w != "--detach")
        .collect();
    let second = std::process::Command::new(words[0]).args(&words[1..]).output()?;
    ensure!(
        !second.status.success() && text(&second).contains("another host agent"),
        "{}",
        text(&second)
    );
    ensure!(instance.guest()?["since"] == before["since"]);
    Ok(())
}

fn a_replaced_program_replaces_the_agent_and_adopts_the_guest(instance: &Instance) -> Result<()> {
    let before = instance.guest()?;
    let agent = instance.process(&["sovereign-host run"])?;
    let program = std::fs::read_link(format!("/proc/{agent}/exe"))?;
    let copy = program.with_extension("copy");
    copy_program(&program, &copy)?;
    std::fs::rename(&copy, &program)?; // what `make build` does
    let up = instance.run(&["up"])?;
    ensure!(
        up.status.success() && text(&up).contains("is replaced"),
        "{}",
        text(&up)
    );
    ensure!(instance.process(&["sovereign-host run"])? != agent);
    let after = instance.guest()?;
    ensure!(after["boot_id"] == before["boot_id"] && after["vmm"]["pid"] == before["vmm"]["pid"]);
    Ok(())
}

fn an_interrupted_up_ends_at_once_whenever_it_comes(instance: &Instance) -> Result<()> {
    for pause_ms in [0, 3, 10, 20, 50, 200, 1_000, 4_000] {
        let mut up = start(instance, &["up"])?;
        std::thread::sleep(Duration::from_millis(pause_ms)); // the moment is what is tried here
        signal(up.id(), Signal::INT)?;
        let asked = Instant::now();
        while up.try_wait()?.is_none() {
            ensure!(asked.elapsed() < SOON, "after {pause_ms} ms: up does not end");
            std::thread::sleep(Duration::from_millis(10)); // polls a process
        }
        let output = up.wait_with_output()?;
        let early = output.status.code().is_none(); // before the handler was there
        ensure!(
            early || (output.status.code() == Some(130) && text(&output).contains("next: ")),
            "after {pause_ms} ms: {} {}",
            output.status,
            text(&output)
        );
        if pause_ms % 20 == 0 {
            instance.ok(&["down"])?;
            ensure!(
                instance.processes().is_empty(),
                "after {pause_ms} ms: {:?}",
                instance.processes()
            );
        }
    }
    instance.ok(&["up"])?;
    instance.ok(&["down"])?;
    Ok(())
}

fn down_during_up_wins_and_up_says_so(instance: &Instance) -> Result<()> {
    let mut up = start(instance, &["up"])?;
    let mut lines = BufReader::new(up.stderr.take().context("no stderr")?);
    let mut line = String::new();
    while !line.contains(" vmm ") {
        line.clear();
        ensure!(lines.read_line(&mut line)? > 0, "up ended before its guest began");
    }
    instance.ok(&["down"])?;
    lines.read_to_string(&mut line)?;
    let status = up.wait()?;
    ensure!(matches!(status.code(), Some(1 | 4 | 6)), "{status}: {line}");
    ensure!(line.contains("next: "), "{line}");
    ensure!(instance.processes().is_empty(), "{:?}", instance.processes());
    Ok(())
}

fn an_unknown_disk_is_never_formatted(instance: &Instance) -> Result<()> {
    let disk = instance.state().join("guests/sql/data.img");
    let kept = instance.path("kept.img");
    std::fs::rename(&disk, &kept)?;
    let length = std::fs::metadata(&kept)?.len();
    let mut foreign = vec![0u8; 1 << 20];
    foreign[..6].copy_from_slice(b"LUKS\xba\xbe");
    std::fs::write(&disk, &foreign)?;
    std::fs::File::options()
        .write(true)
        .open(&disk)?
        .set_len(length)?;
    let up = instance.run(&["up", "--timeout", "60", "--json"])?;
    let answer: Value = serde_json::from_str(
        String::from_utf8_lossy(&up.stdout)
            .lines()
            .last()
            .unwrap_or_default(),
    )?;
    ensure!(answer["ok"] == false && answer["layer"] == "disk", "{answer}");
    instance.ok(&["down"])?;
    let mut after = vec![0u8; 1 << 20];
    std::fs::File::open(&disk)?.read_exact(&mut after)?;
    ensure!(after == foreign, "the foreign disk was written to");
    std::fs::rename(&kept, &disk)?;
    instance.ok(&["up"])?;
    instance.wait("the old disk is good", AGAIN, |guest| guest["ready"] == "True")?;
    kill(instance.process(&["sovereign-host shim"])?);
    instance.ok(&["down"])?;
    ensure!(instance.processes().is_empty(), "{:?}", instance.processes());
    Ok(())
}
