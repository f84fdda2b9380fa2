//! Who undoes the change when we do not: a bare loop with our crates, and scripts.

use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use netlink_sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};

use super::change::{Change, IPV4};
use super::ground::said;

/// The least that a program can do: hear that it is gone, send the one message that makes it again. No model, no look,
/// no plan, no check of what else is there; on the runtime that we use.
pub(super) fn bare(change: Change, tables: &[u8]) -> Result<()> {
    let (protocol, group) = change.place();
    let again = change.made(tables);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let sockets = || -> std::io::Result<_> {
        let (mut ears, mut hands) = (TokioSocket::new(protocol)?, TokioSocket::new(protocol)?);
        ears.socket_mut().set_rx_buf_sz(4 << 20)?;
        ears.socket_mut().bind(&SocketAddr::new(0, group))?;
        hands.socket_mut().bind_auto()?;
        Ok((ears, hands))
    };
    let (ears, hands) = {
        let _in = runtime.enter();
        sockets()?
    };
    std::thread::spawn(move || {
        let ended: Result<()> = runtime.block_on(async {
            let (mut heard, mut answer) = (Vec::with_capacity(64 << 10), Vec::with_capacity(64 << 10));
            let mut gone = false;
            loop {
                heard.clear();
                ears.recv(&mut heard).await?;
                gone |= change.told(&heard, false)?;
                if gone && change.ends(&heard) {
                    gone = false;
                    hands.send(&again).await?;
                    answer.clear();
                    hands.recv(&mut answer).await?;
                }
            }
        });
        eprintln!("the bare loop ended: {ended:?}");
    });
    Ok(())
}

/// A script that runs until it is dropped, with all that it started.
pub(super) struct Script(Child);

impl Drop for Script {
    fn drop(&mut self) {
        if let Some(group) = rustix::process::Pid::from_raw(self.0.id().cast_signed()) {
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
        let _ = self.0.wait();
    }
}

/// A shell script that does the same with the usual programs.
pub(super) fn script(change: &Change, directory: &std::path::Path) -> Result<Script> {
    let text = match change {
        Change::Rule(_) => {
            let all = said("ip", &["-N", "rule", "list", "pref", "9000"])?;
            let rule = all
                .trim()
                .split_once(':')
                .context("no rule")?
                .1
                .replace("proto 83", "protocol 83");
            format!(
                "ip monitor rule | while read -r line; do case $line in\n\
                 *Deleted*9000:*) ip rule add pref 9000 {};; esac; done",
                rule.trim()
            )
        }
        Change::Table(_, name) => {
            let file = directory.join("table.nft");
            std::fs::write(&file, said("nft", &["list", "table", "inet", name])?)?;
            // It tells of each rule first; the table itself is the last that goes.
            format!(
                "nft monitor | while read -r line; do case $line in\n\
                 *'delete table inet {name}'*) nft -f {};; esac; done",
                file.display()
            )
        }
    };
    start(&text)
}

/// The same with iptables, whose nft variant's tables are told of. The chain is ours; the table is iptables' own.
pub(super) fn iptables(directory: &std::path::Path) -> Result<(Change, Script)> {
    let file = directory.join("rules");
    let mut out = std::fs::File::create(&file)?;
    writeln!(out, "*filter\n:bench - [0:0]\n-A FORWARD -j bench")?;
    for n in 2..12 {
        writeln!(out, "-A bench -s 192.168.100.{n} -j ACCEPT")?;
    }
    writeln!(out, "COMMIT")?;
    let restore = || {
        let status = Command::new("iptables-nft-restore").arg(&file).status();
        status.context("no iptables-nft-restore")
    };
    ensure!(restore()?.success(), "iptables-nft-restore fails");
    let text = format!(
        "nft monitor | while read -r line; do case $line in\n\
         *'delete table ip filter'*) iptables-nft-restore {};; esac; done",
        file.display()
    );
    Ok((Change::Table(IPV4, "filter".to_owned()), start(&text)?))
}

fn start(text: &str) -> Result<Script> {
    use std::os::unix::process::CommandExt;
    let child = Command::new("sh")
        .args(["-c", text])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .process_group(0)
        .spawn()
        .context("no sh")?;
    std::thread::sleep(Duration::from_millis(500)); // its monitor says nothing when it listens
    Ok(Script(child))
}
