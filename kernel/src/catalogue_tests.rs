//! Load order and indexes of made-up kernels; the indexes also beside those of the real depmod and modprobe.

use std::{fs, path::Path, process::Command, sync::Arc};

use super::*;
use crate::{modules::ModuleSet, testing::Module};

const RELEASE: &str = "6.0-test";

fn set(modules: &[(&str, Module<'_>)], texts: &[(&str, &str)]) -> ModuleSet {
    let modules = modules
        .iter()
        .map(|(path, module)| ((*path).to_owned(), Arc::from(module.elf())));
    let texts = texts
        .iter()
        .map(|(name, text)| ((*name).to_owned(), Arc::from(text.as_bytes())));
    ModuleSet::new(modules.chain(texts))
}

fn with_info<'a>(path: &'a str, modinfo: &'a str) -> (&'a str, Module<'a>) {
    (
        path,
        Module {
            modinfo,
            ..Module::default()
        },
    )
}

#[test]
fn dependencies_come_first_and_once() {
    let set = set(
        &[
            with_info("kernel/a.ko", "depends=b-one,c\0alias=pci:*\0license=GPL\0"),
            with_info("kernel/b_one.ko", "depends=c\0"),
            with_info("kernel/c.ko", "depends=\0"),
            with_info("kernel/unused.ko", "depends=\0"),
        ],
        &[],
    );
    let catalogue = set.catalogue().unwrap();
    assert_eq!(catalogue.load_order(&["a", "c"]).unwrap(), ["c", "b_one", "a"]);
}

#[test]
fn built_in_modules_are_skipped_and_soft_ones_found_by_algorithm() {
    let set = set(
        &[
            with_info(
                "k/ext4.ko",
                "depends=mbcache\0softdep=pre: crc32c nothere post: late\0",
            ),
            with_info("k/crc32c_generic.ko", "depends=\0"),
        ],
        &[(
            "modules.builtin",
            "kernel/fs/mbcache.ko\nkernel/drivers/virtio-pci.ko\n",
        )],
    );
    let catalogue = set.catalogue().unwrap();
    assert_eq!(
        catalogue.load_order(&["virtio_pci", "ext4"]).unwrap(),
        ["crc32c_generic", "ext4"]
    );
}

#[test]
fn missing_modules_name_who_wants_them() {
    let set = set(&[with_info("k/a.ko", "depends=gone\0")], &[]);
    let catalogue = set.catalogue().unwrap();
    let error = catalogue.load_order(&["a"]).unwrap_err().to_string();
    assert!(
        error.contains("gone") && error.contains("needed by a,"),
        "{error}"
    );
    assert!(matches!(
        catalogue.load_order(&["b"]),
        Err(ModuleError::NotFound { .. })
    ));
}

#[test]
fn circles_and_endless_chains_are_refused() {
    let circle = set(
        &[
            with_info("k/a.ko", "depends=b\0"),
            with_info("k/b.ko", "depends=a\0"),
        ],
        &[],
    );
    let circle = circle.catalogue().unwrap();
    assert!(matches!(
        circle.load_order(&["a"]),
        Err(ModuleError::Circle { .. })
    ));
    assert!(matches!(circle.index_files(), Err(ModuleError::Circle { .. })));

    let names: Vec<[String; 2]> = (0..=DEPTH_MAX)
        .map(|at| [format!("k/m{at}.ko"), format!("depends=m{}\0", at + 1)])
        .collect();
    let modules: Vec<_> = names.iter().map(|[path, info]| with_info(path, info)).collect();
    let chain = set(&modules, &[]).catalogue().unwrap();
    assert!(matches!(chain.index_files(), Err(ModuleError::Circle { .. })));
}

/// A kernel with shared dependencies, equal aliases, brackets, dashes and a compressed-looking order.
fn varied() -> ModuleSet {
    let export = |path, modinfo, exports, needs| {
        (
            path,
            Module {
                modinfo,
                exports,
                needs,
            },
        )
    };
    set(
        &[
            export(
                "kernel/net/nf-core.ko",
                "depends=\0alias=nf-core-*\0",
                &["nf_hook", "nf_ct"],
                &[],
            ),
            export(
                "kernel/net/nf_nat.ko",
                "depends=nf-core\0alias=nft-expr-nat\0alias=pci:v[0-9]d*\0",
                &["nf_nat_setup"],
                &["nf_hook", "printk"],
            ),
            export(
                "kernel/net/nft_masq.ko",
                "depends=nf_nat,nf-core\0alias=nft-expr-nat\0alias=nft-expr-nat\0softdep=pre: nf-log post: late\0",
                &[],
                &["nf_nat_setup", "nf_ct"],
            ),
            export(
                "kernel/drivers/tun.ko",
                "depends=\0alias=devname:net/tun\0alias=char-major-10-200\0",
                &["tun_get"],
                &[],
            ),
            export(
                "kernel/drivers/tap.ko",
                "depends=tun\0alias=broken[x\0",
                &["tun_get_more"],
                &["tun_get"],
            ),
            export("extra/last.ko", "depends=nowhere\0", &[], &["missing_symbol"]),
        ],
        &[
            (
                "modules.order",
                "kernel/net/nft_masq.ko\nkernel/net/nf_nat.ko\nkernel/drivers/tap.ko\nkernel/drivers/tun.ko\nkernel/net/nf-core.ko\nextra/last.ko\n",
            ),
            (
                "modules.builtin",
                "kernel/fs/ext4/ext4.ko\nkernel/fs/mbcache.ko\nkernel/lib/crc32c-x.ko\n",
            ),
            (
                "modules.builtin.modinfo",
                "ext4.alias=fs-ext4\0ext4.license=GPL\0mbcache.file=fs/mbcache\0ext4.alias=fs-ext3\0crc32c_x.alias=crypto-crc32c\0ext4.alias=crypto-crc32c\0",
            ),
        ],
    )
}

fn lay_out(set: &ModuleSet, base: &Path) -> std::path::PathBuf {
    let directory = base.join("lib/modules").join(RELEASE);
    for (path, bytes) in set.packaged() {
        let path = directory.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    directory
}

/// A program of kmod. The tests need it; what builds images does not.
fn kmod(program: &str) -> Command {
    let path = format!("/usr/sbin/{program}");
    assert!(
        Path::new(&path).exists(),
        "these tests need the package kmod ({path})"
    );
    Command::new(path)
}

#[test]
fn the_indexes_are_those_of_depmod() {
    let base = tempfile::tempdir().unwrap();
    let set = varied();
    let directory = lay_out(&set, base.path());
    let depmod = kmod("depmod")
        .arg("-b")
        .arg(base.path())
        .arg(RELEASE)
        .output()
        .unwrap();
    assert!(depmod.status.success(), "{depmod:?}");
    let ours = set.catalogue().unwrap().index_files().unwrap();
    for (name, bytes) in &ours {
        let theirs = fs::read(directory.join(name)).unwrap();
        match *name {
            // depmod writes a heading.
            "modules.softdep" => assert!(theirs.ends_with(bytes), "{name}"),
            // What does not depend on each other it writes in an order of its own.
            "modules.dep" => assert_eq!(dependencies(bytes), dependencies(&theirs)),
            "modules.dep.bin" => assert_eq!(keys(bytes), keys(&theirs)),
            // Where in the file a node is differs between versions of depmod.
            _ => {
                assert!(!entries(bytes).is_empty());
                assert_eq!(
                    (entries(bytes), bytes.len()),
                    (entries(&theirs), theirs.len()),
                    "{name}"
                );
            }
        }
    }
    assert_eq!(ours.len(), 7);
}

fn keys(index: &[u8]) -> Vec<String> {
    entries(index).into_iter().map(|(key, _, _)| key).collect()
}

/// Key, value and priority of everything in an index, in the order of the trie.
fn entries(index: &[u8]) -> Vec<(String, String, u32)> {
    let word = |at: usize| u32::from_be_bytes(index[at..at + 4].try_into().unwrap());
    let text = |at: usize| std::str::from_utf8(index[at..].split(|byte| *byte == 0).next().unwrap()).unwrap();
    let (mut entries, mut todo) = (Vec::new(), vec![(word(8), String::new())]);
    while let Some((node, mut key)) = todo.pop() {
        let mut at = (node & 0x0fff_ffff) as usize;
        if node & 0x8000_0000 != 0 {
            key += text(at);
            at += text(at).len() + 1;
        }
        let mut children = Vec::new();
        if node & 0x2000_0000 != 0 {
            let (first, last) = (index[at], index[at + 1]);
            at += 2;
            for byte in first..=last {
                children.push((word(at), format!("{key}{}", char::from(byte))));
                at += 4;
            }
        }
        if node & 0x4000_0000 != 0 {
            let count = word(at);
            at += 4;
            for _ in 0..count {
                let value = text(at + 4).to_owned();
                let priority = word(at);
                at += 4 + value.len() + 1;
                entries.push((key.clone(), value, priority));
            }
        }
        todo.extend(children.into_iter().rev().filter(|(node, _)| *node != 0));
    }
    entries
}

/// Module to the set of what it needs.
fn dependencies(text: &[u8]) -> BTreeMap<String, BTreeSet<String>> {
    let line = |line: &str| {
        let (path, needed) = line.split_once(':').unwrap();
        (
            path.to_owned(),
            needed.split_whitespace().map(str::to_owned).collect(),
        )
    };
    std::str::from_utf8(text).unwrap().lines().map(line).collect()
}

#[test]
fn modprobe_finds_modules_aliases_and_symbols_in_our_indexes() {
    let base = tempfile::tempdir().unwrap();
    let set = varied();
    let directory = lay_out(&set, base.path());
    for (name, bytes) in set.catalogue().unwrap().index_files().unwrap() {
        fs::write(directory.join(name), bytes).unwrap();
    }
    let shown = |name: &str| {
        let output = kmod("modprobe")
            .args(["-S", RELEASE, "-C", "/dev/null", "-d"])
            .arg(base.path())
            .args(["--show-depends", name])
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let file = |line: &str| line.trim().rsplit('/').next().unwrap().to_owned();
        text.lines().map(file).collect::<Vec<_>>()
    };
    let loads = ["nf-core.ko", "nf_nat.ko", "nft_masq.ko"];
    assert_eq!(shown("nft-masq"), loads);
    assert_eq!(shown("symbol:nf_nat_setup"), ["nf-core.ko", "nf_nat.ko"]);
    assert_eq!(shown("pci:v7d1"), ["nf-core.ko", "nf_nat.ko"]);
    assert_eq!(shown("char-major-10-200"), ["tun.ko"]);
    assert_eq!(shown("tap"), ["tun.ko", "tap.ko"]);
    assert_eq!(shown("ext4"), ["builtin ext4"]);
    assert_eq!(shown("fs-ext3"), ["builtin ext4"]);
    assert!(shown("not_there").is_empty());
}
