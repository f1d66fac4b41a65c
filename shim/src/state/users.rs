//! Users of the host.

use std::fs;

/// The name of a user as `/etc/passwd` has it; else the number.
#[must_use]
pub fn name(uid: u32) -> String {
    named(&fs::read_to_string("/etc/passwd").unwrap_or_default(), uid)
}

fn named(passwd: &str, uid: u32) -> String {
    let uid = uid.to_string();
    let named = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid).then_some(name)
    });
    named.map(str::to_owned).unwrap_or(uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_without_a_name_has_a_number() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\nmail:x:8:8::/:/bin/false\n";
        assert_eq!([0, 8, 9].map(|uid| named(passwd, uid)), ["root", "mail", "9"]);
    }
}
