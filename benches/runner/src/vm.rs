//! A guest of our own on the project's kernel: the VMM's command line is the product's, the init is not.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::Context;
use sovereign_host_agent::shim::accel::Accel;
use sovereign_host_agent::shim::contract::{Paths, ShimConfig};
use sovereign_host_agent::shim::qemu;
use sovereign_protocol::layout::Layout;
use sovereign_protocol::name::Name;
use sovereign_protocol::spec::Image;

use crate::places::Places;

/// Memory of a measured guest, in MiB.
const MEMORY_MIB: u32 = 256;

/// A file for the initramfs, over what the image has there.
pub(crate) struct Extra {
    /// Path without a leading slash.
    pub(crate) path: &'static str,
    /// Its bytes; it is executable.
    pub(crate) bytes: Vec<u8>,
}

/// A machine before its start.
pub(crate) struct Plan {
    config: ShimConfig,
    initramfs: PathBuf,
}

/// A running machine; killed when dropped.
pub(crate) struct Vm {
    child: Child,
    lines: Receiver<(Instant, String)>,
    begun: Instant,
}

impl Plan {
    /// Prepares sockets, disks and initramfs in a directory of the machine's own.
    pub(crate) fn new(dir: &Path, image: &Image, extras: &[Extra]) -> anyhow::Result<Self> {
        let guest = Name::parse("vm")?;
        let layout = Layout {
            instance: Name::parse("bench")?,
            run: dir.join("run"),
            state: dir.join("state"),
        };
        let paths = Paths::of(&layout, &guest);
        std::fs::create_dir_all(layout.guest_run(&guest))?;
        std::fs::create_dir_all(layout.guest_state(&guest))?;
        std::fs::File::create(&paths.data_disk)?.set_len(64 << 20)?;
        let initramfs = dir.join("initramfs");
        write_initramfs(&initramfs, &image.initramfs, extras)?;
        let config = ShimConfig {
            guest,
            memory_mib: MEMORY_MIB,
            vcpus: 1,
            data_mib: 64,
            image: image.clone(),
            card: None,
            paths,
        };
        Ok(Self { config, initramfs })
    }

    /// The same machine with another data disk.
    pub(crate) fn with_data(mut self, disk: PathBuf) -> Self {
        self.config.paths.data_disk = disk;
        self
    }

    /// Where the vsock device listens for the VMM.
    pub(crate) fn vhost(&self) -> PathBuf {
        self.config.paths.vhost()
    }

    /// Where the device's hybrid front listens.
    pub(crate) fn front(&self) -> PathBuf {
        self.config.paths.vsock()
    }

    /// Starts it under `accel`. The VMM dies with the thread that calls this.
    pub(crate) fn start(&self, places: &Places, accel: Accel) -> anyhow::Result<Vm> {
        let mut arguments = qemu::arguments(&self.config, accel, 0, None);
        let initrd = arguments.iter().position(|word| word == "-initrd");
        let initrd = initrd.context("the product's command line has no initramfs")?;
        arguments[initrd + 1] = self.initramfs.clone().into();
        let begun = Instant::now();
        let mut child = Command::new(places.product.join("sovereign-host"))
            .arg("become-vmm")
            .arg(std::process::id().to_string())
            .arg("--")
            .arg(qemu::PROGRAM)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()?;
        let lines = console(child.stdout.take().context("no console")?);
        Ok(Vm { child, lines, begun })
    }
}

impl Vm {
    /// Waits for a line on the console that holds `mark`; the time since the start.
    pub(crate) fn wait(&self, mark: &str, limit: Duration) -> anyhow::Result<Duration> {
        let mut seen = Vec::new();
        loop {
            let left = limit.saturating_sub(self.begun.elapsed());
            let Ok((at, line)) = self.lines.recv_timeout(left) else {
                let tail = seen.split_off(seen.len().saturating_sub(8));
                anyhow::bail!("the guest did not say {mark:?} within {limit:?}; it said {tail:?}");
            };
            if line.contains(mark) {
                return Ok(at - self.begun);
            }
            seen.push(line);
        }
    }

    /// Waits for its end.
    pub(crate) fn ended(mut self, limit: Duration) -> anyhow::Result<()> {
        let begun = Instant::now();
        while self.child.try_wait()?.is_none() {
            anyhow::ensure!(begun.elapsed() < limit, "the guest does not power off");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have ended
        let _ = self.child.wait();
    }
}

/// Each line of the console with the moment at which it came.
fn console(stdout: ChildStdout) -> Receiver<(Instant, String)> {
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        let mut reader = BufReader::new(stdout);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            if sender.send((Instant::now(), text)).is_err() {
                return;
            }
            line.clear();
        }
    });
    lines
}

/// The image's initramfs with one more segment, whose files replace those of the same name.
fn write_initramfs(to: &Path, base: &Path, extras: &[Extra]) -> anyhow::Result<()> {
    let mut bytes = std::fs::read(base).with_context(|| format!("no {}", base.display()))?;
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    let mut segment = Vec::new();
    for extra in extras {
        let length = u32::try_from(extra.bytes.len())?;
        let mut writer = cpio::NewcBuilder::new(extra.path)
            .mode(0o100_755)
            .nlink(1)
            .write(segment, length);
        std::io::Write::write_all(&mut writer, &extra.bytes)?;
        segment = writer.finish()?;
    }
    bytes.extend(cpio::newc::trailer(segment)?);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    std::fs::write(to, bytes)?;
    Ok(())
}
