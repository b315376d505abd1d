package vspheretest

import (
	"io"
	"time"

	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/nfc/nfctest"
)

// Options describe the inventory of a server and how the server behaves.
type Options struct {
	VMs         []VM
	Datacenters []string    // empty: "DC0"; those that VMs name are made too
	Hosts       []Host      // empty: "esx1.test" and "esx2.test" in each datacenter
	Datastores  []Datastore // "ds1" and those that VMs name are made too

	User, Password string        // "": DefaultUser, DefaultPassword
	IdleLimit      time.Duration // a session without calls ends after this time; 0: never
	ESXi           bool          // the server says that it is an ESXi host
	Version        string        // of the server and its hosts, such as "7.0.3"; "": what the simulator says
	ManagedBy      string        // address of the vCenter server that manages the hosts; "": none

	// LibDir is the folder of a stand-in for VDDK's library. The server keeps the folder "disks"
	// in it up to date. It may be empty.
	LibDir string
	// StrictLogin makes the stand-in library refuse other logins than the cookie of the
	// newest session and the user and password of the server.
	StrictLogin bool
	// Dir is the folder for images. It is needed with LibDir. If it is empty, the disks have no
	// content.
	Dir string
	// NFC changes the options of the stand-in for the NFC service of the host with the given name.
	// It is called before the service starts, and must not call methods of the server. It may be
	// nil.
	NFC func(host string, o *nfctest.Options)
	// Log receives a line for each call. It may be nil.
	Log io.Writer
}

// The login of a server whose Options have none.
const (
	DefaultUser     = "administrator@vsphere.local"
	DefaultPassword = "Secret-1"
)

// An Option changes the Options of a server. [VM], [Host] and [Datastore] are Options that add
// themselves to the inventory.
type Option interface{ apply(*Options) }

type optionFunc func(*Options)

func (f optionFunc) apply(o *Options) { f(o) }

// Configure returns an Option that calls f.
func Configure(f func(o *Options)) Option { return optionFunc(f) }

// WithLibrary returns the Option with which New installs a stand-in for VDDK's library that serves
// the disks of the VMs.
func WithLibrary() Option { return Configure(func(o *Options) { o.LibDir = wanted }) }

// WithNFC returns the Option with which the disks of the VMs have content, so that the NFC services of
// the hosts can serve them. WithLibrary has this effect too.
func WithNFC() Option { return Configure(func(o *Options) { o.Dir = wanted }) }

// wanted is the LibDir that New replaces with the folder of a new library, and the Dir that it
// replaces with a new folder.
const wanted = "new"

// VM is a virtual machine. Every field but Name may be left empty.
type VM struct {
	Name       string // as users see it: "/" is not written as "%2f"
	Datacenter string // "": the first one
	Folder     string // path below the VMs of the datacenter, such as "prod/web"; "/" in a name is "%2f"
	Host       string // "": the first one of the datacenter
	Datastore  string // of the VM's own files and of disks that name none; "": "ds1"
	Disks      []Disk

	Power          string // "on", "off" or "suspended"; "": on, but off for a template
	Template       bool
	NoConfig       bool   // the server has lost the configuration
	FaultTolerant  bool   // fault tolerance runs
	Connection     string // "": that of the host; such as "disconnected", "inaccessible", "orphaned"
	ToolsStopped   bool   // VMware Tools do not run
	Version        string // of the virtual hardware; "": "vmx-19"
	Guest          string // guest ID; "": "debian11_64Guest"
	ChangeTracking bool   // the VM's disks have change IDs from the start
	NoTracking     bool   // the VM does not support change tracking

	Snapshots []string                    // names of its users' snapshots, each the child of the one before
	Edit      func(vm *mo.VirtualMachine) // changes the VM at last; it must not replace Config
}

func (v VM) apply(o *Options) { o.VMs = append(o.VMs, v) }

// Disk is a disk of a VM. Every field may be left empty.
type Disk struct {
	Size    int64  // in bytes; 0: that of the content, else 1 MiB
	Content []byte // at the start of the disk; zeros follow
	Image   string // path of a raw image or a device with the content
	Zero    bool   // without Content and Image: the disk is a hole. Else it has data that depends on the name of the VM

	Datastore  string
	File       string // path on the datastore; "": DIR/DIR.vmdk, DIR/DIR_1.vmdk and so on
	Backing    string // "flat" (or ""), "sparse", "sesparse", "rdm-virtual", "rdm-physical", "rdm-raw", "pmem"
	Mode       string // "": "persistent"
	Sharing    string // such as "sharingMultiWriter"
	Bus        string // sharing of the bus of its controller, such as "physicalSharing"
	Controller string // "scsi" (or ""), "sata", "nvme", "ide"
	KeyID      string // of the key with which the disk is encrypted
	UUID       string // "": made from File, or else from the name of the VM; NoUUID: none
	LUN        string // of a raw device mapping
	Label      string // "": "Hard disk N"

	Edit func(d *types.VirtualDisk) // changes the disk at last
}

// NoUUID is the UUID of a disk that has none.
const NoUUID = "none"

// Host is an ESXi host.
type Host struct {
	Name         string
	Datacenter   string // "": the first one
	Disconnected bool
}

func (h Host) apply(o *Options) { o.Hosts = append(o.Hosts, h) }

// Datastore is a datastore that all hosts of a datacenter have.
type Datastore struct {
	Name       string
	Datacenter string // "": the first one
	Type       string // "": "VMFS"; such as "NFS", "vsan", "VVOL"
	Free       int64  // bytes; 0: 1 TiB
}

func (d Datastore) apply(o *Options) { o.Datastores = append(o.Datastores, d) }
