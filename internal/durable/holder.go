package durable

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Held says whether a process has locked a file.
type Held string

// These are the values of Held.
const (
	HeldYes     Held = "yes"
	HeldNo      Held = "no"
	HeldUnknown Held = "unknown" // the process is, or was, on another host
)

// Holder describes the process that has locked a file with [Lock], or that had locked it and was
// killed.
type Holder struct {
	Held  Held
	PID   int       // 0: not known
	Host  string    // "": not known
	Since time.Time // zero: not known
}

// LockHolder says which process has locked the file at path with [Lock]. It locks nothing itself,
// not even for a moment, because a process that wants the lock just then would not get it.
func LockHolder(path string) (Holder, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return Holder{Held: HeldNo}, nil
	}
	if err != nil {
		return Holder{}, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, 200))
	if err != nil {
		return Holder{}, err
	}
	info, err := f.Stat()
	if err != nil {
		return Holder{}, err
	}
	h := parseHolder(string(text))
	own, _ := os.Hostname()
	locks, err := os.ReadFile("/proc/locks")
	switch {
	case h.Host != "" && h.Host != own:
		h.Held = HeldUnknown
	case err != nil && h.PID > 0: // without the list of locks, a process that is alive counts as holding its lock
		h.Held = HeldNo
		if err := unix.Kill(h.PID, 0); err == nil || errors.Is(err, unix.EPERM) {
			h.Held = HeldYes
		}
	case err != nil:
		h.Held = HeldUnknown
	default:
		h.Held = HeldNo
		if pid := flockOf(locks, info.Sys().(*syscall.Stat_t), h.PID); pid != 0 {
			h.Held, h.PID = HeldYes, pid
		}
	}
	return h, nil
}

// parseHolder parses the text that Lock writes into the file that it has locked.
func parseHolder(text string) (h Holder) {
	var since string
	if n, _ := fmt.Sscanf(text, "process %d on ", &h.PID); n != 1 {
		return Holder{}
	}
	_, rest, _ := strings.Cut(text, " on ")
	h.Host, since, _ = strings.Cut(strings.TrimSpace(rest), ", since ")
	h.Since, _ = time.Parse(time.RFC3339, since)
	return h
}

// flockOf looks for a lock of a file in the text of /proc/locks, and returns the process that has
// it, or 0. Some file systems have other device numbers in that text. Therefore the number of the
// file is enough if the process is the expected one.
func flockOf(locks []byte, st *syscall.Stat_t, expected int) (pid int) {
	for line := range bytes.Lines(locks) {
		var number, kind, mode, access string
		var major, minor uint32
		var inode uint64
		n, _ := fmt.Sscanf(string(line), "%s %s %s %s %d %x:%x:%d", &number, &kind, &mode, &access, &pid, &major, &minor, &inode)
		if n != 8 || kind != "FLOCK" || inode != st.Ino {
			continue
		}
		if pid == expected || unix.Mkdev(major, minor) == uint64(st.Dev) {
			return pid
		}
	}
	return 0
}
