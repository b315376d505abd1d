package batch

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/durable"
	"github.com/vddkcp/vddkcp/internal/printable"
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
	Mark        string     `json:"mark,omitempty"`    // identity of the target, noted when it was whole and before it got its name
	Size        int64      `json:"size"`              // of the target when all was done; -1: no file
	Backing     string     `json:"backing,omitempty"` // what the target is an overlay of, as Options.Backing said when it was whole
	Redo        bool       `json:"redo,omitempty"`    // it was done before, and is no longer
	Report      *JobReport `json:"report,omitempty"`
}

// stateFile is what a state file holds. Entries are not decoded until they are
// needed.
type stateFile struct {
	Version int               `json:"version"`
	Jobs    []json.RawMessage `json:"jobs"`
}

// privateMode is the mode of the files of a batch: the messages in them may have
// what only this user should see.
const privateMode = 0o600

// Store is the state file of a batch, locked against other runs. It is safe for
// concurrent use.
//
// A change goes to a second file first, beside it, whose end alone is written:
// that outlives a kill of the process, and costs the same however many jobs there
// are. The state file is rewritten by keepWritten, after each change, but with rests
// so long that it takes a hundredth of the time.
type Store struct {
	path string
	lock *os.File

	mu      sync.Mutex // guards what follows
	order   []string
	texts   map[string][]byte // of each entry, as it stands in the file
	changes *os.File          // all since the state file was opened, one a line
	made    uint64            // changes so far
	noting  time.Duration     // spent on changes
	changed chan struct{}     // has one when keepWritten has something to do

	there atomic.Bool // the state file exists

	naming sync.Once // makes the names of the state file and of changes durable
	named  error     // set by naming

	writing sync.Mutex    // guards what follows
	written uint64        // changes that it has
	wrote   time.Duration // spent on writing it
}

// After it was written the state file rests so many times as long as that took, but
// not so long that people who look at it wonder.
const (
	stateRest   = 100
	longestRest = 2 * time.Second
)

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
	s := &Store{path: path, lock: lock, texts: map[string][]byte{}, changed: make(chan struct{}, 1)}
	if err := s.open(); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// open reads what an earlier run left, and begins with no changes.
func (s *Store) open() error {
	err := s.load()
	if err != nil {
		return err
	}
	// The changes that were replayed are truncated next.
	if err := s.flush(); err != nil {
		return err
	}
	changes, err := durable.Open(s.changesPath(), os.O_RDWR|os.O_CREATE|os.O_APPEND, privateMode)
	if err != nil {
		return fmt.Errorf("state file: %w", err)
	}
	if err = beginsWith(changes, "\n{"); err == nil {
		err = changes.Truncate(0)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("state file: %w", err), changes.Close())
	}
	s.changes = changes
	return nil
}

// load reads what an earlier run left.
func (s *Store) load() error {
	if err := s.read(); err != nil {
		return err
	}
	if !s.there.Load() { // somebody removed it, to start anew
		return nil
	}
	return s.replay()
}

func (s *Store) changesPath() string { return s.path + ".changes" }

// lockFile takes the lock beside the state file, which itself is replaced with
// every change.
func lockFile(path string) (*os.File, error) {
	name := path + ".lock"
	for {
		f, err := durable.Open(name, os.O_RDWR|os.O_CREATE, privateMode)
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
		if err := beginsWith(f, "process "); err != nil {
			return nil, errors.Join(fmt.Errorf("lock: %w", err), f.Close())
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
	text, err := durable.ReadFile(s.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("state file: %w", err)
	}
	s.there.Store(true)
	var file stateFile
	if err := json.Unmarshal(text, &file); err != nil {
		return fmt.Errorf("state file %s: %w; want what an earlier run wrote: remove it to start anew", s.path, err)
	}
	if file.Version != 1 {
		return fmt.Errorf("state file %s: version %d, want 1", s.path, file.Version)
	}
	for i, text := range file.Jobs {
		name, err := checkEntry(text)
		if err != nil {
			return fmt.Errorf("state file %s: job %d: %w", s.path, i, err)
		}
		s.keep(name, text)
	}
	return nil
}

// replay takes over the changes that a run which was killed left.
func (s *Store) replay() error {
	text, err := durable.ReadFile(s.changesPath())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("state file: %w", err)
	}
	for line := range bytes.SplitSeq(text, []byte("\n")) {
		// One that was cut, by a kill or a full file system, was not made.
		if !json.Valid(line) {
			continue
		}
		name, err := checkEntry(line)
		if err != nil {
			return fmt.Errorf("%s: %w", s.changesPath(), err)
		}
		s.keep(name, line)
		s.made++
	}
	return nil
}

// checkEntry returns the name of the job that text is the entry of.
func checkEntry(text []byte) (name string, err error) {
	var e entry
	if err := json.Unmarshal(text, &e); err != nil {
		return "", err
	}
	return e.Name, e.valid()
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

// put sets an entry. When it returns, a kill of the process does not lose it.
func (s *Store) put(e *entry) error {
	begun := time.Now()
	text, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("state file: %w", err)
	}
	if err := s.append(e.Name, printable.Bytes(text)); err != nil {
		return fmt.Errorf("state file: %w", err)
	}
	s.mu.Lock()
	s.noting += time.Since(begun)
	s.mu.Unlock()
	if !s.there.Load() {
		return s.flush()
	}
	return nil
}

// putDurably sets an entry. When it returns, a loss of power does not lose it
// either.
func (s *Store) putDurably(e *entry) error {
	if err := s.put(e); err != nil {
		return err
	}
	if err := unix.Fdatasync(int(s.changes.Fd())); err != nil {
		return fmt.Errorf("state file: fdatasync %s: %w", s.changes.Name(), err)
	}
	s.naming.Do(func() { s.named = durable.SyncFolder(filepath.Dir(s.path)) })
	if s.named != nil {
		return fmt.Errorf("state file: %w", s.named)
	}
	return nil
}

func (s *Store) append(name string, text []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keep(name, text)
	s.made++
	select {
	case s.changed <- struct{}{}:
	default:
	}
	// A line begins with its end, so that one that could not be written as a whole
	// spoils no other.
	_, err := s.changes.Write(append([]byte("\n"), text...))
	return err
}

// keepWritten writes the state file after changes, until done is closed. Failed is
// called with the first error.
func (s *Store) keepWritten(done <-chan struct{}, failed func(error)) {
	for {
		select {
		case <-s.changed:
		case <-done:
			return
		}
		begun := time.Now()
		if err := s.flush(); err != nil && failed != nil {
			failed(err)
			failed = nil
		}
		rest := time.NewTimer(min(stateRest*time.Since(begun), longestRest))
		select {
		case <-rest.C:
		case <-done:
			rest.Stop()
			return
		}
	}
}

// flush writes the state file, where it lacks a change.
func (s *Store) flush() error {
	s.writing.Lock()
	defer s.writing.Unlock()
	begun := time.Now()
	// Jobs wait for mu: the texts, which nobody changes, are put together without it.
	s.mu.Lock()
	have, texts, length := s.made, make([][]byte, len(s.order)), 0
	for i, name := range s.order {
		texts[i] = s.texts[name]
		length += len(texts[i])
	}
	s.mu.Unlock()
	if s.written == have {
		return nil
	}
	var text bytes.Buffer
	text.Grow(length + 4*len(texts) + 64)
	text.WriteString("{\"version\":1,\"jobs\":[\n")
	for i, entry := range texts {
		if i > 0 {
			text.WriteString(",\n")
		}
		text.Write(entry)
	}
	text.WriteString("\n]}\n")
	// Only the run that holds the lock uses this name.
	err := durable.ReplaceBy(s.path+".new", s.path, text.Bytes(), privateMode)
	s.wrote += time.Since(begun)
	if err != nil {
		return fmt.Errorf("state file: %w", err)
	}
	s.there.Store(true)
	s.written = have
	return nil
}

// cost is the time that was spent so far, by jobs on noting changes and beside them
// on writing the state file.
func (s *Store) cost() (noting, writing time.Duration) {
	s.writing.Lock()
	defer s.writing.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.noting, s.wrote
}

// Close gives the lock back.
func (s *Store) Close() error {
	var err error
	if s.changes != nil {
		err = s.changes.Close()
		if s.written == s.made { // else they are all there is
			err = errors.Join(err, os.Remove(s.changesPath()))
		}
	}
	// Removed while it is locked, so that nobody locks what is going away.
	return errors.Join(err, os.Remove(s.lock.Name()), s.lock.Close())
}

// beginsWith returns an error for a file that has content and begins otherwise:
// it belongs to somebody else, and must not be overwritten.
func beginsWith(f *os.File, want string) error {
	head := make([]byte, len(want))
	n, err := f.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if n > 0 && !strings.HasPrefix(want, string(head[:n])) {
		return fmt.Errorf("%s begins with %q and is %w; remove it", f.Name(), head[:n], durable.ErrForeign)
	}
	return nil
}

// fileSize is the size of a regular file, or -1.
func fileSize(path string) int64 {
	fi, err := os.Stat(path)
	if err != nil || !fi.Mode().IsRegular() {
		return -1
	}
	return fi.Size()
}
