//! Makes text from the guest safe for terminals and logs: a compromised guest may write anything,
//! and a terminal, often root's, executes escape sequences.

/// The longest text that is shown, in characters.
const LENGTH_MAX: usize = 4096;

/// Characters that change how text around them is shown: Unicode's bidirectional formatting,
/// invisible separators and tags.
const INVISIBLE: [std::ops::RangeInclusive<char>; 6] = [
    '\u{200b}'..='\u{200f}',
    '\u{2028}'..='\u{202e}',
    '\u{2060}'..='\u{206f}',
    '\u{feff}'..='\u{feff}',
    '\u{fff9}'..='\u{fffb}',
    '\u{e0000}'..='\u{e007f}',
];

/// Returns the text as one line that a terminal shows as it is: control characters become blanks or
/// are escaped, and a long text is cut.
#[must_use]
pub fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len().min(LENGTH_MAX));
    for (number, character) in text.chars().enumerate() {
        if number == LENGTH_MAX {
            shown.push('…');
            break;
        }
        match character {
            '\n' | '\r' | '\t' => shown.push(' '),
            _ if character.is_control() || INVISIBLE.iter().any(|it| it.contains(&character)) => {
                shown.extend(character.escape_unicode());
            }
            _ => shown.push(character),
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_shown_instead() {
        for (said, shown) in [
            ("exec: \"nö\": not found", "exec: \"nö\": not found"),
            ("a\nb\r\tc", "a b  c"),
            ("\u{1b}]0;title\u{7}", "\\u{1b}]0;title\\u{7}"),
            ("\u{9b}31m", "\\u{9b}31m"),
            ("gpj.\u{202e}exe", "gpj.\\u{202e}exe"),
            ("\u{7f}\u{feff}", "\\u{7f}\\u{feff}"),
        ] {
            assert_eq!(printable(said), shown);
        }
    }

    #[test]
    fn what_is_long_is_cut() {
        let long = printable(&"x".repeat(100_000));
        assert_eq!(long.chars().count(), LENGTH_MAX + 1);
        assert!(long.ends_with("x…"));
    }
}
