package main

import "github.com/vddkcp/vddkcp/cmd/vddkcp/internal/manual"

// helpExamples are the examples at the end of the help of each command, and in the manual pages.
// TestHelpExamples runs each of them as it is.
var helpExamples = []manual.Example{
	{Command: "", About: "Copy a VMDK, with all files that belong to it, to a qcow2 image.", Line: `vddkcp web01.vmdk web01.qcow2`},
	{Command: "", About: "Copy all disks of a VM on the server of the profile vc1 into a folder.", Line: `vddkcp vm web01 images/ --profile vc1`},
	{Command: "", About: "Run the copies in a job file, with a report for people.", Line: `vddkcp run jobs.json --report night.html`},

	{Command: "copy", About: "Copy a VMDK to a qcow2 image, and compare the two.", Line: `vddkcp copy web01.vmdk web01.qcow2 --verify`},
	{Command: "copy", About: "Copy the first disk of an appliance to a compressed qcow2 image.", Line: `vddkcp 'appliance.ova#1' appliance.qcow2 --compress zstd`},
	{Command: "copy", About: "Copy the first disk of a VM, which may run, on the server of the profile vc1.", Line: `vddkcp 'vm:web01#1' web01.raw --profile vc1`},

	{Command: "vm", About: "Copy all disks of a VM to qcow2 images in a folder.", Line: `vddkcp vm web01 images/ --profile vc1 --format qcow2`},
	{Command: "vm", About: "Print the disks and their targets, and change nothing on the server.", Line: `vddkcp vm web01 'images/{vm}-{n}.qcow2' --profile vc1 --dry-run`},
	{Command: "vm", About: "Continue the copy if an earlier run was interrupted.", Line: `vddkcp vm web01 images/ --profile vc1 --format qcow2 --resume`},

	{Command: "run", About: "Check the job file, the sources and the space, and copy nothing.", Line: `vddkcp run jobs.json --check`},
	{Command: "run", About: "Run all jobs, with a report for programs and one for people.", Line: `vddkcp run jobs.json --report night.json --report night.html`},
	{Command: "run", About: "Continue an earlier run: skip the jobs that are done.", Line: `vddkcp run jobs.json --resume`},

	{Command: "export", About: "Let another program read a VMDK without a copy.", Line: `vddkcp export web01.vmdk --run 'qemu-img info "$uri"'`},
	{Command: "export", About: "Serve a disk on a socket, with a file for what clients write.", Line: `vddkcp export disk.qcow2 --cow=writes.cow --listen unix:disk.sock`},
	{Command: "export", About: "Serve a disk of a VM, without changing it.", Line: `vddkcp export 'vm:web01#1' --profile vc1 --listen unix:web01.sock`},

	{Command: "info", About: "Print what is known about a disk.", Line: `vddkcp info web01.vmdk`},
	{Command: "info", About: "The same about a disk of an appliance, for programs.", Line: `vddkcp info 'appliance.ova#1' --json`},

	{Command: "map", About: "Print which ranges of a disk have data, and where.", Line: `vddkcp map web01.vmdk`},
	{Command: "map", About: "The same for programs.", Line: `vddkcp map disk.qcow2 --json`},

	{Command: "verify", About: "Compare a copy with its source.", Line: `vddkcp verify web01.vmdk copy.qcow2`},
	{Command: "verify", About: "Compare a disk with the digest in a file.", Line: `vddkcp verify copy.qcow2 --digest "$(cat copy.sha256)"`},

	{Command: "ls", About: "List all VMs of a server.", Line: `vddkcp ls --profile vc1`},
	{Command: "ls", About: "List the disks of all VMs whose names begin with web.", Line: `vddkcp ls 'web*' --disks --profile vc1`},

	{Command: "jobs", About: "Write a job file that copies all disks of all VMs into a folder.", Line: `vddkcp jobs --profile vc1 --target images/ >jobs.json`},
	{Command: "jobs", About: "The same for some VMs, with a template for the names of the files.", Line: `vddkcp jobs 'web*' --profile vc1 --target 'images/{vm}-{n}.qcow2'`},

	{Command: "check", About: "Check whether a VM can be copied, without changing anything.", Line: `vddkcp check web01 --profile vc1`},
	{Command: "check", About: "Print a role with the privileges that vddkcp needs.", Line: `vddkcp check --role`},

	{Command: "cleanup", About: "List snapshots that interrupted runs have left.", Line: `vddkcp cleanup --profile vc1`},
	{Command: "cleanup", About: "Remove those that are older than two days.", Line: `vddkcp cleanup --remove --older-than 48h --profile vc1`},

	{Command: "profile add", About: "Store a server and a login. vddkcp asks for the user and the password.", Line: `vddkcp profile add vc1 --server vc.example.com`},
	{Command: "profile add", About: "The same for a script, with the password in a file.", Line: `vddkcp profile add vc1 --server vc.example.com --thumbprint "$(cat vc1.sha256)" --user backup --password +vc1.password --yes`},
	{Command: "profile list", About: "List the profiles.", Line: `vddkcp profile list`},
	{Command: "profile list", About: "The same for programs. No secrets are printed.", Line: `vddkcp profile list --json`},
	{Command: "profile remove", About: "Remove a profile.", Line: `vddkcp profile remove vc1`},
	{Command: "profile remove", About: "Remove a profile, and list the others.", Line: `vddkcp profile remove vc1 && vddkcp profile list`},

	{Command: "thumbprint", About: "Print the thumbprints of a server, to compare them with those that it shows itself.", Line: `vddkcp thumbprint vc.example.com`},
	{Command: "thumbprint", About: "The same for programs.", Line: `vddkcp thumbprint vc.example.com --json`},

	{Command: "vddk", About: "Print which VDDK library is found.", Line: `vddkcp vddk`},
	{Command: "vddk", About: "The same for programs.", Line: `vddkcp vddk --json`},

	{Command: "completion", About: "Complete words in this shell.", Line: `source <(vddkcp completion bash)`},
	{Command: "completion", About: "Complete words in each new fish.", Line: `vddkcp completion fish >~/.config/fish/completions/vddkcp.fish`},

	{Command: "version", About: "Print the version.", Line: `vddkcp version`},
	{Command: "version", About: "Print it with the build and the supported libraries, for programs.", Line: `vddkcp version --json`},
}

// exitStatuses are the exit statuses of vddkcp, for the help and the manual. docs/cli.md describes
// them, too.
var exitStatuses = []manual.Status{
	{Status: "0", Meaning: "done, and what was written is durable"},
	{Status: "1", Meaning: "failed"},
	{Status: "2", Meaning: "wrong use: a bad flag, job file, configuration file or parameter"},
	{Status: "3", Meaning: "two disks, or a disk and its digest, differ", Commands: []string{"copy", "verify", "vm"}},
	{Status: "4", Meaning: "some jobs of a batch failed, and the others are done", Commands: []string{"run"}},
	{Status: "5", Meaning: "done, but a snapshot that vddkcp made is still on the server", Commands: []string{"copy", "export", "map", "run", "verify", "vm"}},
	{Status: "75", Meaning: "failed for a temporary reason; --resume can continue", Commands: []string{"copy", "export", "run", "verify", "vm"}},
	{Status: "129, 130, 143", Meaning: "stopped by SIGHUP, SIGINT or SIGTERM"},
}
