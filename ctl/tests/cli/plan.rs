//! `plan` changes nothing, as strace sees it.

use serde_json::Value;

use crate::home::{Home, code, stderr, stdout};

/// Calls in strace's record that change something, make a process, or reach out. An image's identity holds the
/// version of mkfs.erofs, which only the program itself can tell.
fn changes(record: &str) -> Vec<&str> {
    let changes = |line: &&str| {
        let call = line.split_whitespace().nth(1).unwrap_or_default();
        match call.split('(').next().unwrap_or_default() {
            "openat" | "open" => ["O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC"]
                .iter()
                .any(|flag| line.contains(flag) && !line.contains("/dev/null")),
            "clone" | "clone3" => !line.contains("CLONE_THREAD") && !line.contains("CLONE_VFORK"),
            "execve" => !line.contains("mkfs.erofs"),
            "socket" => !line.contains("AF_UNIX"),
            "<..." => false, // the rest of a line that was seen
            _ => true,
        }
    };
    record.lines().skip(1).filter(changes).collect()
}

#[test]
fn plan_shows_links_and_addresses_and_changes_nothing() {
    let home = Home::new();
    home.run(&["init"]);
    let traced = "trace=openat,open,creat,mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,rmdir,link,linkat,\
                  symlink,symlinkat,truncate,ftruncate,fallocate,chmod,fchmod,fchmodat,utimensat,mount,unshare,setns,\
                  clone,clone3,fork,vfork,execve,socket,kill,pidfd_send_signal,mknodat,setxattr";
    let record = home.path().join("record");
    let record_to = record.to_str().unwrap();
    let strace = [
        "strace",
        "-f",
        "-qqq",
        "-o",
        record_to,
        "-e",
        traced,
        "-e",
        "signal=none",
    ];
    let planned = home.installed(&strace, &["plan"]);
    assert_eq!(code(&planned), 0, "{}", stderr(&planned));
    assert_eq!(
        stdout(&planned).lines().collect::<Vec<_>>(),
        [
            "build the image postgresql-17",
            "start the host agent",
            "network: make a private network namespace where that works (auto), else guests get no card",
            "link sv5pkj: create bridge, address 02:87:bc:c5:a8:42, group 1315857411",
            "link sv5pkj-sql: create tap, group 1315857411",
            "link sv5pkj-sql: make port of sv5pkj",
            "link lo: set up",
            "link sv5pkj: set up",
            "link sv5pkj-sql: set up",
            "address 192.168.100.1/24: add to sv5pkj",
            "sql: make a data disk of 2048 MiB (sparse)",
            "sql: boot with 256 MiB, 192.168.100.127/24 (private)",
            "sql: forward postgres: 127.0.0.1:15432 to port 5432",
        ]
    );
    let text = std::fs::read_to_string(&record).unwrap();
    assert!(text.contains("sovereign.toml"), "the record shows calls: {text}");
    assert!(changes(&text).is_empty(), "{:#?}", changes(&text));
    let mut left: Vec<_> = std::fs::read_dir(home.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left, ["bin", "record", "sovereign.toml"]);

    let dry = home.installed(&[], &["up", "--dry-run", "--json"]);
    assert_eq!(code(&dry), 0);
    let object: Value = serde_json::from_str(&stdout(&dry)).unwrap();
    assert_eq!(
        (&object["ok"], &object["reason"]),
        (&Value::from(true), &Value::from("Planned"))
    );
    assert_eq!(object["steps"][9]["change"], "add_address");
    // The same record of something that does change: the test can fail.
    home.installed(&strace, &["init", "--config", "other.toml"]);
    let text = std::fs::read_to_string(&record).unwrap();
    assert!(changes(&text).iter().any(|line| line.contains("other.toml")));
}
