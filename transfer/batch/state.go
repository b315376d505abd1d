package batch

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/durable"
	"github.com/vddkcp/vddkcp/internal/fileversion"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/internal/retry"
)

// phase is how far a job has come, according to the state file.
type phase string

const (
	phaseRunning     phase = "running"
	phaseCopied      phase = "copied" // the target is whole, but the after command has not succeeded yet
	phaseDone        phase = "done"
	phaseFailed      phase = "failed"
	phaseInterrupted phase = "interrupted"
)

// entry is the state of one job in the state file.
type entry struct {
	Name        string     `json:"name"`
	Phase       phase      `json:"phase"`
	Fingerprint string     `json:"fingerprint"`
	Attempts    int        `json:"attempts"`
	Mark        string     `json:"mark,omitempty"`    // of the target's file by package fileid, recorded before the file got its name
	Size        int64      `json:"size"`              // of the target when the job was done, in bytes; -1: no file
	Backing     string     `json:"backing,omitempty"` // Runner.Backing when the target was whole
	Redo        bool       `json:"redo,omitempty"`    // the job was done before, and must run again
	Report      *JobReport `json:"report,omitempty"`
}

// stateFile is the JSON of a state file. The entries of the jobs are decoded only when they are
// needed.
type stateFile struct {
	Version int               `json:"version"`
	Jobs    []json.RawMessage `json:"jobs"`
}

// stateFormat says which versions of state files this package reads.
var stateFormat = fileversion.Format{
	Name: "state file", Oldest: 1, Newest: 1,
	Otherwise: "start the batch from the beginning with another state file (--state)",
}

// Store is the state file of a batch, locked against other runs. It is safe for concurrent use.
//
// Each change of a job's state is first appended to a second file, next to the state file. The
// change then survives a kill of the process, at a cost that does not depend on the number of
// jobs. The method keepWritten rewrites the whole state file after changes. After each rewriting
// it pauses (see stateRest), because rewriting a large file all the time would be a waste.
type Store struct {
	path string
	lock *os.File

	mu      sync.Mutex // guards the fields of this group
	order   []string
	texts   map[string][]byte // the JSON of each entry, by the name of the job
	changes *os.File          // the second file: one changed entry per line
	made    uint64            // number of changes so far
	noting  time.Duration     // time spent on appending changes
	changed chan struct{}     // holds a value if keepWritten has something to do

	there atomic.Bool // the state file exists

	naming sync.Once // makes the names of the state file and of changes durable
	named  error     // set by naming

	writing sync.Mutex    // guards the fields of this group
	written uint64        // number of changes that the state file contains
	wrote   time.Duration // time spent on writing it
}

// keepWritten pauses each time it has written the state file. Such a pause is stateRest times as
// long as the writing took. But it is not longer than longestRest, because people look at the file
// during the batch.
const (
	stateRest   = 100
	longestRest = 2 * time.Second
)

// UsedError reports that another run has locked the state file.
type UsedError struct{ path, by string }

func (e *UsedError) Error() string {
	return fmt.Sprintf("state file %s is in use by %s", e.path, e.by)
}

// Hint says what the user can do while another run uses the state file.
func (e *UsedError) Hint() string {
	return "wait for that run, or give this run a state file of its own with --state"
}

// OpenStore locks the state file at path, and reads it if it exists. The error is a
// *[UsedError] if another run has locked it. Close releases the lock.
func OpenStore(path string) (*Store, error) {
	lock, err := durable.Lock(path + lockSuffix)
	if locked := (*durable.LockedError)(nil); errors.As(err, &locked) {
		return nil, &UsedError{path, locked.By}
	}
	if err != nil {
		return nil, fmt.Errorf("state file %s: %w", path, err)
	}
	s := &Store{path: path, lock: lock, texts: map[string][]byte{}, changed: make(chan struct{}, 1)}
	if err := s.open(); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// The method open reads the state that an earlier run left, and empties the second file, which
// holds the changes.
func (s *Store) open() error {
	err := s.load()
	if err != nil {
		return err
	}
	// The changes in the second file, which the method load has applied in memory, must be in the
	// state file before the second file is emptied.
	if err := s.flush(); err != nil {
		return err
	}
	changes, err := durable.Open(s.changesPath(), os.O_RDWR|os.O_CREATE|os.O_APPEND, durable.Private)
	if err != nil {
		return fmt.Errorf("state file: %w", err)
	}
	if err = durable.BeginsWith(changes, "\n{"); err == nil {
		err = changes.Truncate(0)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("state file: %w", err), changes.Close())
	}
	s.changes = changes
	return nil
}

// The method load reads the state file, and then the second file with the changes that the state
// file does not contain yet.
func (s *Store) load() error {
	if err := s.read(); err != nil {
		return err
	}
	if !s.there.Load() { // the user removed the state file to start over: the changes do not count
		return nil
	}
	return s.replay()
}

func (s *Store) changesPath() string { return s.path + ".changes" }

// The method read reads the state file.
func (s *Store) read() error {
	text, err := durable.ReadFile(s.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("state file: %w", err)
	}
	s.there.Store(true)
	if err := stateFormat.CheckJSON(text); err != nil {
		return fmt.Errorf("state file %s: %w", s.path, err)
	}
	var file stateFile
	if err := json.Unmarshal(text, &file); err != nil {
		return fmt.Errorf("state file %s: %w; expected the complete state file of an earlier run: remove the file to start over", s.path, err)
	}
	if err := stateFormat.Check(int64(file.Version)); err != nil {
		return fmt.Errorf("state file %s: %w", s.path, err)
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

// The method replay applies the changes in the second file. These changes are left from a run that
// was killed before it rewrote the state file.
func (s *Store) replay() error {
	text, err := durable.ReadFile(s.changesPath())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("state file: %w", err)
	}
	for line := range bytes.SplitSeq(text, []byte("\n")) {
		// A line may be incomplete after a kill or when the file system was full. The change in
		// such a line was never completed, and is therefore ignored.
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

// checkEntry checks the JSON of an entry and returns the name of the entry's job.
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
			return fmt.Errorf("the entry has the phase %s but no report", e.Phase)
		}
	default:
		return fmt.Errorf("the entry has the phase %q: want running, copied, done, failed or interrupted", e.Phase)
	}
	return nil
}

// The method keep stores the JSON of a job's entry in memory. The caller holds s.mu, unless no
// other goroutine has the Store yet.
func (s *Store) keep(name string, text []byte) {
	if _, ok := s.texts[name]; !ok {
		s.order = append(s.order, name)
	}
	s.texts[name] = text
}

// The method get returns the entry of a job, or nil if there is none.
func (s *Store) get(name string) *entry {
	s.mu.Lock()
	text, ok := s.texts[name]
	s.mu.Unlock()
	if !ok {
		return nil
	}
	e := new(entry)
	if err := json.Unmarshal(text, e); err != nil {
		panic(err) // checkEntry or put has checked it
	}
	return e
}

// The method put sets the entry of a job. When put has returned, the entry survives a kill of the
// process.
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

// putDurably sets the entry of a job. When putDurably has returned, the entry survives a power
// failure.
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
	// The newline is written before the entry and not after it. If the previous entry in the file
	// is incomplete, the newline separates it from the new entry.
	_, err := s.changes.Write(append([]byte("\n"), text...))
	return err
}

// keepWritten writes the state file whenever there are changes, until the channel done is closed.
// It passes the first error to the function onError, and ignores later errors.
func (s *Store) keepWritten(done <-chan struct{}, onError func(error)) {
	for {
		select {
		case <-s.changed:
		case <-done:
			return
		}
		begun := time.Now()
		if err := s.flush(); err != nil && onError != nil {
			onError(err)
			onError = nil
		}
		if !retry.Sleep(context.Background(), min(stateRest*time.Since(begun), longestRest), done) {
			return
		}
	}
}

// The method flush writes the state file, unless it contains all changes already.
func (s *Store) flush() error {
	s.writing.Lock()
	defer s.writing.Unlock()
	begun := time.Now()
	// Jobs that change their state wait for the lock s.mu. The lock is therefore held only while
	// the list of the JSON texts is copied. The texts themselves are never changed in place.
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
	// The new content is first written to a second file, whose name ends in .new. The lock of the
	// Store ensures that no other run uses that file.
	err := durable.ReplaceBy(s.path+".new", s.path, text.Bytes(), durable.Private)
	s.wrote += time.Since(begun)
	if err != nil {
		return fmt.Errorf("state file: %w", err)
	}
	s.there.Store(true)
	s.written = have
	return nil
}

// The method cost returns how long this run has spent on two things so far: on appending changes,
// for which jobs wait, and on writing the state file, for which they do not wait.
func (s *Store) cost() (noting, writing time.Duration) {
	s.writing.Lock()
	defer s.writing.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.noting, s.wrote
}

// Close closes the files and releases the lock.
func (s *Store) Close() error {
	var err error
	if s.changes != nil {
		err = s.changes.Close()
		if s.written == s.made { // otherwise the file of changes is needed by the next run
			err = errors.Join(err, os.Remove(s.changesPath()))
		}
	}
	// The lock file is removed while it is still locked. Another process may have opened the file
	// before its removal and lock it afterwards. That process notices that the file was removed
	// (see lockFile).
	return errors.Join(err, os.Remove(s.lock.Name()), s.lock.Close())
}

// fileSize returns the size of a regular file in bytes, or -1 for anything else.
func fileSize(path string) int64 {
	fi, err := os.Stat(path)
	if err != nil || !fi.Mode().IsRegular() {
		return -1
	}
	return fi.Size()
}
