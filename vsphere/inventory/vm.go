// Package inventory describes virtual machines and their disks, as a vCenter server or an ESXi
// host knows them, in plain types. Package vsphere fills these types, and package
// transfer/machine copies what they describe. The tests of the latter therefore need no server.
//
// A [VM] has disks, and each [Disk] has a [Verdict], which says when it can be copied. Disks are
// identified by their UUID and their device key, never by their place in a list. [Mark] is the
// description by which vddkcp recognises the snapshots that it has made.
package inventory

import "time"

// Power is the power state of a VM.
type Power string

// The values of Power.
const (
	On        Power = "on"
	Off       Power = "off"
	Suspended Power = "suspended" // for a copy, the same as On
)

// VM describes a virtual machine. Its JSON form is a machine of the output of "vddkcp ls --json",
// which docs/cli.md describes. Names are decoded: a "/" in a name is not written as "%2f".
type VM struct {
	Name                string   `json:"name"`
	Path                string   `json:"path"` // in the inventory, as "/DATACENTER/vm/FOLDER/NAME"; "/", "\" and "%" in a name are encoded
	Moref               string   `json:"moref"`
	InstanceUUID        string   `json:"instance_uuid"`
	Power               Power    `json:"power"`
	Host                string   `json:"host"` // name of the ESXi host on which the VM is registered
	Template            bool     `json:"template"`
	Guest               string   `json:"guest"`   // guest ID, such as "debian11_64Guest"
	Version             string   `json:"version"` // of the virtual hardware, such as "vmx-19"
	Firmware            string   `json:"firmware"`
	Tools               string   `json:"tools"` // status of VMware Tools, such as "guestToolsRunning"
	Tracking            Tracking `json:"change_tracking"`
	ConsolidationNeeded bool     `json:"consolidation_needed"`
	Snapshots           []Node   `json:"snapshots"` // the whole tree, parents before children
	NICs                []NIC    `json:"nics"`
	Disks               []Disk   `json:"disks"`
	Details             `json:"-"`
}

// Details are the properties of a VM that users do not see in lists.
type Details struct {
	Verdict        Verdict // of the VM as a whole, for example of one without a configuration
	Reason         string  // why Verdict is not Running
	NoConfig       bool    // the server does not have or does not show the configuration of the VM
	FaultTolerance string  // such as "notConfigured" and "running"
	BIOSUUID       string
	HostMoref      string
	HostVersion    string  // of ESXi, such as "8.0.2"; "": unknown
	Connection     string  // state of the connection to the VM's host, such as "connected"
	ChangeVersion  string  // changes with the configuration of the VM
	Question       string  // that the VM waits for an answer to; "": none
	Folder         string  // path of the folder of the VM, encoded as in Path, relative to the VMs of the datacenter; "" for its top
	Stores         []Store // the datastores on which the VM has its configuration and its disks
}

// Tracking says whether the changed blocks of a VM's disks are tracked.
type Tracking struct {
	Supported bool `json:"supported"`
	Enabled   bool `json:"enabled"`
}

// NIC is a network adapter of a VM.
type NIC struct {
	MAC     string `json:"mac"`
	Network string `json:"network"`
	Type    string `json:"type"` // such as "vmxnet3"
}

// Store is a datastore.
type Store struct {
	Name  string
	Moref string
	Type  string // such as "VMFS", "NFS", "vsan" and "VVOL"
	Free  int64  // bytes; -1: unknown, since the datastore is not accessible
}

// Node is a snapshot in the tree of a VM's snapshots.
type Node struct {
	Name    string    `json:"name"`
	Moref   string    `json:"moref"`
	Parent  string    `json:"parent"` // moref of the parent; "" for a root of the tree
	Created time.Time `json:"created"`
	Ours    bool      `json:"ours"` // vddkcp made it: Mark is not nil
	Mark    *Mark     `json:"-"`
}
