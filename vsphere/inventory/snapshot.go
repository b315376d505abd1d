package inventory

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"regexp"
	"time"
)

// Quiesce says whether a snapshot is made of a quiesced guest, which has flushed its file systems.
type Quiesce string

// The values of Quiesce.
const (
	NoQuiesce   Quiesce = ""
	TryQuiesce  Quiesce = "try" // make a snapshot without quiescing if quiescing fails
	MustQuiesce Quiesce = "yes" // fail if quiescing fails
)

// Request asks for a snapshot.
type Request struct {
	Name    string // from NewName
	Mark    Mark
	Quiesce Quiesce
	// Consolidate allows to consolidate the disks of the VM at the end even if they needed it
	// before the snapshot was made.
	Consolidate bool
}

// Snapshot is a snapshot, in most cases one that vddkcp has made. Its disks are those of the
// snapshot's own configuration, with the files that the snapshot keeps unchanged. They are not the
// disks of the VM, whose files change while it runs. Disks that are not in the snapshot, such as
// independent disks, are not in the list.
type Snapshot struct {
	Name     string
	Moref    string
	Quiesced bool
	Disks    []Disk
}

// Disk returns the disk of the snapshot that is the disk d of the VM, or nil if the snapshot does
// not have it.
func (s *Snapshot) Disk(d *Disk) *Disk {
	for i := range s.Disks {
		if SameDisk(&s.Disks[i], d) {
			return &s.Disks[i]
		}
	}
	return nil
}

// Mark is the description of a snapshot that vddkcp makes. It is one line of JSON. A snapshot is
// vddkcp's own if its name is one that NewName returns and its description is a Mark.
type Mark struct {
	Version int       `json:"vddkcp"` // 1
	ID      string    `json:"id"`     // of the run, as in the name
	Round   int       `json:"round"`  // 1, or greater for a run that makes several snapshots
	Host    string    `json:"host"`   // name of the machine on which vddkcp runs
	Started time.Time `json:"started"`
	// Unconsolidated says that the disks of the VM needed to be consolidated even before the
	// snapshot was made. Then vddkcp does not consolidate them after it has removed the snapshot.
	Unconsolidated bool `json:"unconsolidated,omitempty"`
}

// The expression ourName matches the names of vddkcp's snapshots. A later snapshot of the same run
// may have the number of its round at the end of its name.
var ourName = regexp.MustCompile(`^(vddkcp-[0-9a-f]{16})(/[0-9]+)?$`)

// NewName returns a new name for a snapshot: "vddkcp-" and 16 random hexadecimal digits.
func NewName() string {
	var b [8]byte
	rand.Read(b[:])
	return "vddkcp-" + hex.EncodeToString(b[:])
}

// OurName reports whether a snapshot of the given name can be vddkcp's own: NewName has returned the
// name, or the name with the number of a round at its end.
func OurName(name string) bool { return ourName.MatchString(name) }

// String returns the description of the snapshot.
func (m Mark) String() string {
	m.Version = 1
	text, err := json.Marshal(m)
	if err != nil {
		panic(fmt.Sprintf("inventory: a Mark that is no JSON: %v", err)) // a time outside of the years 0 to 9999
	}
	return string(text)
}

// ParseMark returns the Mark of a snapshot with the given name and description. It returns nil if
// vddkcp did not make the snapshot.
func ParseMark(name, description string) *Mark {
	match := ourName.FindStringSubmatch(name)
	if match == nil || len(description) > 4096 {
		return nil
	}
	m := new(Mark)
	if json.Unmarshal([]byte(description), m) != nil || m.Version != 1 || "vddkcp-"+m.ID != match[1] {
		return nil
	}
	return m
}
