//! Fakes for tests: a key that signs, packages of chosen entries, a mirror on loopback.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::{SystemTime, UNIX_EPOCH},
};

use pgp::{
    composed::{
        ArmorOptions, CleartextSignedMessage, KeyType, SecretKeyParamsBuilder, SignedPublicKey,
        SignedSecretKey, SubkeyParamsBuilder,
    },
    types::Password,
};

use crate::{Archive, keyring::Keyring};

/// A day in November 2026.
pub(crate) const NOW: u64 = 1_795_270_000;

/// A key made for one test.
pub(crate) struct Signer {
    key: SignedSecretKey,
    by_subkey: bool,
}

impl Signer {
    /// Signs with its primary key.
    pub(crate) fn primary() -> Self {
        Self::new(false)
    }

    /// Signs with a subkey; its primary key only certifies.
    pub(crate) fn subkey() -> Self {
        Self::new(true)
    }

    fn new(by_subkey: bool) -> Self {
        let mut subkey = SubkeyParamsBuilder::default();
        subkey.key_type(KeyType::Ed25519Legacy).can_sign(true);
        let mut parameters = SecretKeyParamsBuilder::default();
        parameters
            .key_type(KeyType::Ed25519Legacy)
            .can_certify(true)
            .can_sign(!by_subkey)
            .primary_user_id("test".into())
            .subkeys(if by_subkey {
                vec![subkey.build().unwrap()]
            } else {
                vec![]
            });
        let key = parameters.build().unwrap().generate(rand::thread_rng()).unwrap();
        Self { key, by_subkey }
    }

    pub(crate) fn certificate(&self) -> SignedPublicKey {
        SignedPublicKey::from(self.key.clone())
    }

    /// A keyring that trusts it for both archives.
    pub(crate) fn keyring_of_both(&self) -> Keyring {
        Keyring::of(
            [Archive::Main, Archive::Security]
                .map(|archive| (archive, self.certificate()))
                .to_vec(),
        )
    }

    /// A keyring that trusts it for the main archive only.
    pub(crate) fn keyring(&self) -> Keyring {
        Keyring::of(vec![(Archive::Main, self.certificate())])
    }

    pub(crate) fn sign(&self, text: &str) -> Vec<u8> {
        let (random, password) = (rand::thread_rng(), Password::empty());
        let message = if self.by_subkey {
            CleartextSignedMessage::sign(random, text, &self.key.secret_subkeys[0].key, &password)
        } else {
            CleartextSignedMessage::sign(random, text, &self.key.primary_key, &password)
        };
        message
            .unwrap()
            .to_armored_bytes(ArmorOptions::default())
            .unwrap()
    }

    /// The time at which its signatures are valid.
    pub(crate) fn now(&self) -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
    }
}

/// One entry of a test package.
pub(crate) struct TarEntry {
    path: String,
    kind: tar::EntryType,
    target: String,
    content: Vec<u8>,
}

impl TarEntry {
    pub(crate) fn of_kind(path: &str, kind: tar::EntryType) -> Self {
        Self {
            path: path.to_owned(),
            kind,
            target: String::new(),
            content: Vec::new(),
        }
    }

    pub(crate) fn file(path: &str, content: &[u8]) -> Self {
        Self {
            content: content.to_vec(),
            ..Self::of_kind(path, tar::EntryType::Regular)
        }
    }

    pub(crate) fn directory(path: &str) -> Self {
        Self::of_kind(path, tar::EntryType::Directory)
    }

    pub(crate) fn link(path: &str, target: &str) -> Self {
        Self {
            target: target.to_owned(),
            ..Self::of_kind(path, tar::EntryType::Symlink)
        }
    }

    pub(crate) fn hard_link(path: &str, target: &str) -> Self {
        Self {
            target: target.to_owned(),
            ..Self::of_kind(path, tar::EntryType::Link)
        }
    }
}

/// A package with an uncompressed `data.tar`; names go in as they are, however hostile.
pub(crate) fn deb(entries: &[TarEntry]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for entry in entries {
        let mut header = tar::Header::new_gnu();
        header.as_old_mut().name[..entry.path.len()].copy_from_slice(entry.path.as_bytes());
        header.as_old_mut().linkname[..entry.target.len()].copy_from_slice(entry.target.as_bytes());
        header.set_entry_type(entry.kind);
        header.set_mode(0o755);
        header.set_size(entry.content.len() as u64);
        header.set_cksum();
        tar.append(&header, entry.content.as_slice()).unwrap();
    }
    let tar = tar.into_inner().unwrap();
    let mut deb = b"!<arch>\n".to_vec();
    for (name, bytes) in [("debian-binary", b"2.0\n".as_slice()), ("data.tar", &tar)] {
        deb.extend(
            format!(
                "{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n",
                0,
                0,
                0,
                100_644,
                bytes.len()
            )
            .bytes(),
        );
        deb.extend(bytes);
        if bytes.len() % 2 == 1 {
            deb.push(b'\n');
        }
    }
    deb
}

/// `bytes` as xz data.
pub(crate) fn xz(bytes: &[u8]) -> Vec<u8> {
    let mut writer = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(0)).unwrap();
    writer.write_all(bytes).unwrap();
    writer.finish().unwrap()
}

/// A mirror on loopback; its files can be changed while it runs. Its thread ends with the test process.
pub(crate) struct Server {
    pub(crate) address: String,
    pub(crate) files: Arc<Mutex<BTreeMap<String, Vec<u8>>>>,
}

impl Server {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let files = Arc::new(Mutex::new(BTreeMap::new()));
        let shared = Arc::clone(&files);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                answer(stream, &shared);
            }
        });
        Self { address, files }
    }

    pub(crate) fn put(&self, path: &str, bytes: impl Into<Vec<u8>>) {
        self.files.lock().unwrap().insert(path.to_owned(), bytes.into());
    }
}

fn answer(mut stream: TcpStream, files: &Mutex<BTreeMap<String, Vec<u8>>>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap())
        .lines()
        .map_while(Result::ok);
    let request = lines.next().unwrap_or_default();
    lines.find(String::is_empty);
    let path = request.split(' ').nth(1).unwrap_or_default();
    let body = files.lock().unwrap().get(path).cloned();
    let status = if body.is_some() { "200 OK" } else { "404 Not Found" };
    let body = body.unwrap_or_default();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let _ = stream
        .write_all(head.as_bytes())
        .and_then(|()| stream.write_all(&body));
}
