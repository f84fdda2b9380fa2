//! QEMU's command line, as a pure value.

use std::ffi::OsString;
use std::path::Path;

use sovereign_protocol::boot::{AGENT_SERIAL, DATA_SERIAL, ROOT_SERIAL};

use super::accel::Accel;
use super::contract::ShimConfig;
use crate::net::card;

/// The program, looked up in PATH.
pub const PROGRAM: &str = "qemu-system-x86_64";
/// The guest kernel's command line. Secrets never stand here.
const KERNEL_LINE: &str = "console=ttyS0 panic=-1 quiet";

/// The arguments for one boot; the VMM inherits `initrd_fd` and, for a guest with a card, the TAP.
#[must_use]
pub fn arguments(config: &ShimConfig, accel: Accel, initrd_fd: i32, tap_fd: Option<i32>) -> Vec<OsString> {
    let memory = config.memory_mib;
    let mut line = Line::default();
    line.words(&["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    line.words(&["-name", config.guest.as_str()]);
    line.machine(accel);
    line.words(&["-smp", &config.vcpus.to_string(), "-m", &format!("{memory}M")]);
    let backend = format!("memory-backend-memfd,id=mem,size={memory}M,share=on");
    line.words(&["-object", &backend]);
    line.pair("-kernel", config.image.kernel.as_os_str());
    line.words(&["-initrd", &format!("/proc/self/fd/{initrd_fd}")]);
    line.words(&["-append", KERNEL_LINE]);
    line.words(&[
        "-chardev",
        "stdio,id=console,signal=off",
        "-serial",
        "chardev:console",
    ]);
    line.with_path("-qmp", "unix:", &config.paths.qmp(), ",server=on,wait=off");
    line.with_path("-chardev", "socket,id=vsock,path=", &config.paths.vhost(), "");
    line.words(&["-device", "vhost-user-vsock-pci,chardev=vsock"]);
    line.words(&["-device", "virtio-rng-pci"]);
    line.disk(ROOT_SERIAL, &config.image.root, ",readonly=on");
    line.disk(AGENT_SERIAL, &config.image.agent, ",readonly=on");
    line.disk(DATA_SERIAL, &config.paths.data_disk, ",discard=unmap");
    if let (Some(card), Some(tap)) = (&config.card, tap_fd) {
        line.0.extend(card::arguments(tap, card.mac, card.mtu));
    }
    line.0
}

/// The arguments of a machine that only shows whether an accelerator can run this kernel.
#[must_use]
pub fn probe_arguments(kernel: &Path, accel: Accel) -> Vec<OsString> {
    let mut line = Line::default();
    line.words(&[
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-m",
        "128M",
    ]);
    line.words(&["-object", "memory-backend-memfd,id=mem,size=128M,share=on"]);
    line.machine(accel);
    line.pair("-kernel", kernel.as_os_str());
    line.words(&["-append", "console=ttyS0 panic=-1"]);
    line.words(&[
        "-chardev",
        "stdio,id=console,signal=off",
        "-serial",
        "chardev:console",
    ]);
    line.0
}

#[derive(Default)]
struct Line(Vec<OsString>);

impl Line {
    fn words(&mut self, words: &[&str]) {
        self.0.extend(words.iter().map(OsString::from));
    }

    fn pair(&mut self, key: &str, value: &std::ffi::OsStr) {
        self.0.push(key.into());
        self.0.push(value.to_owned());
    }

    /// A path inside an option: a comma in it is doubled, as QEMU's option parser wants it.
    fn with_path(&mut self, key: &str, before: &str, path: &Path, after: &str) {
        let path = path.to_string_lossy().replace(',', ",,");
        self.words(&[key, &format!("{before}{path}{after}")]);
    }

    /// `-cx16`: QEMU 7.2's TCG corrupts EFLAGS around cmpxchg16b (FACTS section 8).
    fn machine(&mut self, accel: Accel) {
        let machine = format!("q35,accel={accel},memory-backend=mem");
        let cpu = match accel {
            Accel::Kvm => "host",
            Accel::Tcg => "max,-cx16",
        };
        self.words(&["-machine", &machine, "-cpu", cpu]);
    }

    fn disk(&mut self, serial: &str, path: &Path, options: &str) {
        self.with_path(
            "-drive",
            &format!("if=none,id={serial},format=raw,file="),
            path,
            options,
        );
        self.words(&[
            "-device",
            &format!("virtio-blk-pci,drive={serial},serial={serial}"),
        ]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shim::contract::Paths;
    use sovereign_protocol::layout::Layout;
    use sovereign_protocol::name::Name;
    use sovereign_protocol::spec::Image;

    fn config() -> ShimConfig {
        let layout = Layout {
            instance: Name::parse("default").unwrap(),
            run: "/r".into(),
            state: "/s,t".into(),
        };
        let guest = Name::parse("sql").unwrap();
        ShimConfig {
            paths: Paths::of(&layout, &guest),
            guest,
            memory_mib: 256,
            vcpus: 1,
            data_mib: 64,
            card: None,
            image: Image {
                kernel: "/i/vmlinux".into(),
                initramfs: "/i/initramfs".into(),
                root: "/i/root".into(),
                agent: "/i/agent".into(),
                digest: "d".into(),
            },
        }
    }

    #[test]
    fn the_line_of_a_guest_under_tcg() {
        let words: Vec<String> = arguments(&config(), Accel::Tcg, 9, None)
            .into_iter()
            .map(|w| w.into_string().unwrap())
            .collect();
        let line = words.join(" ");
        for part in [
            "-machine q35,accel=tcg,memory-backend=mem -cpu max,-cx16",
            "-object memory-backend-memfd,id=mem,size=256M,share=on",
            "-initrd /proc/self/fd/9",
            "-qmp unix:/r/sql/qmp.sock,server=on,wait=off",
            "file=/s,,t/guests/sql/data.img,discard=unmap",
            "virtio-blk-pci,drive=root,serial=root",
            "-no-reboot",
        ] {
            assert!(line.contains(part), "{part} in {line}");
        }
        assert!(!line.contains("netdev"), "a guest without a network has no card");
    }
}
