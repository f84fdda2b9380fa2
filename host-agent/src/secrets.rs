//! Secret values of an instance: one 0600 file beside the store, never in it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context;
use sovereign_protocol::handshake::random_hex;
use sovereign_protocol::mesh::{Role, ServiceRef};
use sovereign_protocol::name::Name;
use sovereign_protocol::secret::Secret;
use sovereign_protocol::spec::Exposed;

use crate::files;

/// The secrets file.
#[derive(Debug)]
pub struct Secrets {
    path: PathBuf,
    values: BTreeMap<String, Exposed>,
}

impl Secrets {
    /// Reads the file, or begins an empty one.
    ///
    /// # Errors
    /// When it is there and cannot be read: nothing is ever generated over it.
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        let values = match files::read_optional(path)? {
            Some(bytes) => {
                serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged", path.display()))?
            }
            None => BTreeMap::new(),
        };
        Ok(Self {
            path: path.to_owned(),
            values,
        })
    }

    /// A service's own password; made and kept on first use.
    ///
    /// # Errors
    /// When it cannot be kept.
    pub fn password(&mut self, guest: &Name, service: &Name) -> anyhow::Result<Exposed> {
        self.value(format!("{guest}/{service}"))
    }

    /// The password of a role of a service, which both the service and who logs in are told; as [`Secrets::password`].
    ///
    /// # Errors
    /// When it cannot be kept.
    pub fn credential(&mut self, of: &ServiceRef, role: &Role) -> anyhow::Result<Exposed> {
        self.value(format!("{of}/{role}"))
    }

    fn value(&mut self, key: String) -> anyhow::Result<Exposed> {
        if let Some(value) = self.values.get(&key) {
            return Ok(value.clone());
        }
        let value = Exposed(Secret::new(random_hex::<16>()?));
        let mut values = self.values.clone();
        values.insert(key, value.clone());
        files::replace(&self.path, &serde_json::to_vec_pretty(&values)?)?;
        self.values = values; // not before: a value that is not kept must not be used
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_made_once_and_a_damaged_file_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secrets.json");
        let (guest, service) = (Name::parse("sql").unwrap(), Name::parse("postgres").unwrap());
        let first = Secrets::load(&path).unwrap().password(&guest, &service).unwrap();
        let again = Secrets::load(&path).unwrap().password(&guest, &service).unwrap();
        assert_eq!(first, again);
        assert_eq!(first.0.reveal().len(), 32);

        let beside = dir.path().join("secrets.json.new");
        std::fs::create_dir(&beside).unwrap(); // now nothing can be written
        let (mut secrets, other) = (Secrets::load(&path).unwrap(), Name::parse("other").unwrap());
        for _ in 0..2 {
            assert!(
                secrets.password(&guest, &other).is_err(),
                "a value that is not kept"
            );
        }
        std::fs::remove_dir(&beside).unwrap();
        assert!(secrets.password(&guest, &other).is_ok());

        std::fs::write(&path, "{").unwrap();
        assert!(
            Secrets::load(&path)
                .unwrap_err()
                .to_string()
                .contains("is damaged")
        );
        assert_eq!(std::fs::read(&path).unwrap(), b"{");
    }
}
