package inventory

import (
	"fmt"

	"github.com/vddkcp/vddkcp/internal/printable"
)

// Disk is a virtual disk of a VM or of a snapshot. Sizes are in bytes.
type Disk struct {
	N             int     `json:"n"`   // number of the disk in the VM's list of devices, from 1; for users only
	Key           int32   `json:"key"` // names the disk in calls to the server
	UUID          string  `json:"uuid"`
	Label         string  `json:"label"`      // such as "Hard disk 1"
	Controller    string  `json:"controller"` // such as "scsi0"
	Unit          int32   `json:"unit"`       // number of the disk on its controller; -1: unknown
	Size          int64   `json:"size"`
	Mode          string  `json:"mode"`    // such as "persistent" and "independent_persistent"
	Backing       Backing `json:"backing"` // kind of the files that hold the disk
	File          string  `json:"file"`    // as "[DATASTORE] DIR/DISK.vmdk"
	Datastore     string  `json:"datastore"`
	DatastoreType string  `json:"datastore_type"`
	Sharing       Sharing `json:"sharing"`
	Encrypted     bool    `json:"encrypted"`
	ChangeID      string  `json:"change_id"`
	Verdict       Verdict `json:"verdict"`
	Reason        string  `json:"reason"` // why Verdict is not Running, or what limits the copy of a running VM; may be ""
	LUN           string  `json:"-"`      // of a raw device mapping
}

// Title returns the number and the label of the disk for messages, such as "disk 2 (Hard disk 2)".
func (d *Disk) Title() string {
	if d.Label == "" {
		return fmt.Sprintf("disk %d", d.N)
	}
	return fmt.Sprintf("disk %d (%s)", d.N, printable.Name(d.Label))
}

// Sharing is the way in which several VMs use a disk at the same time.
type Sharing string

// The values of Sharing.
const (
	NotShared   Sharing = ""
	MultiWriter Sharing = "multi-writer"
	VirtualBus  Sharing = "virtual-bus"  // VMs of one host share the disk's SCSI controller
	PhysicalBus Sharing = "physical-bus" // VMs of several hosts share the disk's SCSI controller
)

// Backing is the kind of a disk's files.
type Backing string

// The values of Backing.
const (
	Flat        Backing = "flat"
	Sparse      Backing = "sparse"
	SeSparse    Backing = "sesparse"
	RDMVirtual  Backing = "rdm-virtual"  // a raw device mapping of which snapshots can be made
	RDMPhysical Backing = "rdm-physical" // a raw device mapping without snapshots
	PMem        Backing = "pmem"
	Unknown     Backing = "unknown"
)

// Verdict says when a disk can be copied.
type Verdict string

// The values of Verdict.
const (
	Running Verdict = "running" // always: a snapshot keeps its content unchanged
	WhenOff Verdict = "off"     // only while the VM is powered off
	Never   Verdict = "never"
)

// SameDisk reports whether a and b are the same disk of a VM. Two disks are the same if they have
// the same UUID and the same key. Some disks have no UUID, and the copy of a VMDK has the UUID of
// the original, so neither the UUID nor the key is enough.
func SameDisk(a, b *Disk) bool { return a.Key == b.Key && a.UUID == b.UUID }
