package journal

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Beside returns the path of the journal for a target that is a file. The parameter partial is the
// path that this file has until the copy is complete. The journal is in the folder of
// that file.
func Beside(partial string) string { return partial + ".journal" }

// DefaultPath returns the path of the journal for a block device or an NBD export. The journal is
// in the user's state folder ($XDG_STATE_HOME of the XDG Base Directory Specification), which
// DefaultPath creates. The journal's file name identifies the device or export.
func DefaultPath(target string) (string, error) {
	dir := os.Getenv("XDG_STATE_HOME")
	if !filepath.IsAbs(dir) {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", fmt.Errorf("cannot find a folder for the journal (name a file with --journal): %w", err)
		}
		dir = filepath.Join(home, ".local", "state")
	}
	dir = filepath.Join(dir, "vddkcp")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("cannot create a folder for the journal (name a file with --journal): %w", err)
	}
	readable := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' || r == '-' {
			return r
		}
		return '_'
	}, strings.Trim(target, "/"))
	sum := sha256.Sum256([]byte(target))
	return filepath.Join(dir, readable[:min(len(readable), 64)]+"-"+hex.EncodeToString(sum[:8])+".journal"), nil
}
