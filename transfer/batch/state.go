package batch

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// phase is how far a job is, by the state file.
type phase string

const (
	phaseRunning     phase = "running"
	phaseCopied      phase = "copied" // the target is whole, the after command has not succeeded yet
	phaseDone        phase = "done"
	phaseFailed      phase = "failed"
	phaseInterrupted phase = "interrupted"
)

// entry is what the state file says of a job. Sizes are bytes.
type entry struct {
	Name        string     `json:"name"`
	Phase       phase      `json:"phase"`
	Fingerprint string     `json:"fingerprint"`
	Attempts    int        `json:"attempts"`
	Before      string     `json:"before"` // identity of the target when the copy began; "": there was none
	Size        int64      `json:"size"`   // of the target when all was done; -1: no file
	Report      *JobReport `json:"report,omitempty"`
}

// stateFile is what a state file holds. Entries are not decoded until they are
// needed.
type stateFile struct {
	Version int               `json:"version"`
	Jobs    []json.RawMessage `json:"jobs"`
}

// Store is the state file of a batch, locked against other runs. It is safe for
// concurrent use.
type Store struct {
	path string
	lock *os.File

	mu    sync.Mutex // guards what follows
	order []string
	texts map[string][]byte // of each entry, as it stands in the file
	made  uint64            // changes so far

	writing sync.Mutex
	written uint64        // changes that the file has; guarded by writing
	spent   time.Duration // on writing; guarded by writing
}

// UsedError says that another run has a state file.
type UsedError struct{ path, by string }

func (e *UsedError) Error() string {
	return fmt.Sprintf("state file %s is in use by %s", e.path, e.by)
}

// Hint says what can be done.
func (e *UsedError) Hint() string {
	return "wait for that run, or give this one a state file of its own with --state"
}

// OpenStore locks the state file at path and reads it, where there is one. It is
// a *UsedError where another run has it.
func OpenStore(path string) (*Store, error) {
	lock, err := lockFile(path)
	if err != nil {
		return nil, err
	}
	s := &Store{path: path, lock: lock, texts: map[string][]byte{}}
	if err := s.read(); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// lockFile takes the lock beside the state file, which itself is replaced with
// every change.
func lockFile(path string) (*os.File, error) {
	name := path + ".lock"
	for {
		f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o644)
		if err != nil {
			return nil, fmt.Errorf("state file %s: %w", path, err)
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			defer f.Close()
			if !errors.Is(err, unix.EWOULDBLOCK) {
				return nil, fmt.Errorf("lock %s: %w", name, err)
			}
			owner, _ := io.ReadAll(io.LimitReader(f, 200)) // it may be about to be written
			by := strings.TrimSpace(string(owner))
			if by == "" {
				by = "another run"
			}
			return nil, &UsedError{path, by}
		}
		// Whoever had it may have removed it before we got it.
		ours, err := f.Stat()
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		if there, err := os.Stat(name); err != nil || !os.SameFile(ours, there) {
			f.Close()
			continue
		}
		host, _ := os.Hostname() // only for people
		owner := fmt.Sprintf("process %d on %s, since %s\n", os.Getpid(), host, time.Now().Format(time.RFC3339))
		err = f.Truncate(0)
		if err == nil {
			_, err = f.WriteAt([]byte(owner), 0)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", name, err), f.Close())
		}
		return f, nil
	}
}

// read takes over what an earlier run left.
func (s *Store) read() error {
	text, err := os.ReadFile(s.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("state file: %w", err)
	}
	var file stateFile
	if err := json.Unmarshal(text, &file); err != nil {
		return fmt.Errorf("state file %s: %w; want what an earlier run wrote: remove it to start anew", s.path, err)
	}
	if file.Version != 1 {
		return fmt.Errorf("state file %s: version %d, want 1", s.path, file.Version)
	}
	for i, text := range file.Jobs {
		var e entry
		if err := json.Unmarshal(text, &e); err != nil {
			return fmt.Errorf("state file %s: job %d: %w", s.path, i, err)
		}
		if err := e.valid(); err != nil {
			return fmt.Errorf("state file %s: job %d: %w", s.path, i, err)
		}
		s.keep(e.Name, text)
	}
	return nil
}

func (e *entry) valid() error {
	switch e.Phase {
	case phaseRunning, phaseFailed, phaseInterrupted:
	case phaseDone, phaseCopied:
		if e.Report == nil || e.Report.Report == nil {
			return fmt.Errorf("phase %s without a report", e.Phase)
		}
	default:
		return fmt.Errorf("phase %q: want running, copied, done, failed or interrupted", e.Phase)
	}
	return nil
}

// keep sets an entry. The caller holds mu, or is alone.
func (s *Store) keep(name string, text []byte) {
	if _, ok := s.texts[name]; !ok {
		s.order = append(s.order, name)
	}
	s.texts[name] = text
}

// get returns the entry of a job, or nil.
func (s *Store) get(name string) *entry {
	s.mu.Lock()
	text, ok := s.texts[name]
	s.mu.Unlock()
	if !ok {
		return nil
	}
	e := new(entry)
	if err := json.Unmarshal(text, e); err != nil {
		panic(err) // it was read or made by us
	}
	return e
}

// put sets an entry and writes the file. Changes that come while it is being
// written share the next writing.
func (s *Store) put(e *entry) error {
	text, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("state file: %w", err)
	}
	s.mu.Lock()
	s.keep(e.Name, text)
	s.made++
	mine := s.made
	s.mu.Unlock()
	return s.write(mine)
}

// write sees that the file has the first so many changes.
func (s *Store) write(changes uint64) error {
	s.writing.Lock()
	defer s.writing.Unlock()
	if s.written >= changes {
		return nil
	}
	begun := time.Now()
	var text bytes.Buffer
	s.mu.Lock()
	have := s.made
	text.WriteString("{\"version\":1,\"jobs\":[\n")
	for i, name := range s.order {
		if i > 0 {
			text.WriteString(",\n")
		}
		text.Write(s.texts[name])
	}
	s.mu.Unlock()
	text.WriteString("\n]}\n")
	// The lock makes it ours: what a kill leaves is overwritten.
	f, err := os.OpenFile(s.path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err == nil {
		err = replaceFile(f, s.path, text.Bytes())
	}
	if err != nil {
		return fmt.Errorf("state file: %w", err)
	}
	s.written = have
	s.spent += time.Since(begun)
	return nil
}

// flush writes what could not be written before.
func (s *Store) flush() error {
	s.mu.Lock()
	made := s.made
	s.mu.Unlock()
	return s.write(made)
}

// Close gives the lock back.
func (s *Store) Close() error {
	// Removed while it is locked, so that nobody locks what is going away.
	return errors.Join(os.Remove(s.lock.Name()), s.lock.Close())
}

// replaceFile puts text at path as a whole or not at all, durably, by way of the
// new file f beside it, which it closes.
func replaceFile(f *os.File, path string, text []byte) error {
	defer os.Remove(f.Name()) // no longer there after the rename
	_, err := f.Write(text)
	if err == nil {
		err = f.Sync()
	}
	if closed := f.Close(); err == nil {
		err = closed
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	return err
}

// identity tells a file at path apart from any later one there; "" is no file.
func identity(path string) string {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return ""
	}
	return fmt.Sprintf("%d:%d:%d.%09d:%d", st.Dev, st.Ino, st.Mtim.Sec, st.Mtim.Nsec, st.Size)
}

// fileSize is the size of a regular file, or -1.
func fileSize(path string) int64 {
	fi, err := os.Stat(path)
	if err != nil || !fi.Mode().IsRegular() {
		return -1
	}
	return fi.Size()
}
