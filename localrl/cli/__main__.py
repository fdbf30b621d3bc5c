from localrl.cli import main

main()
